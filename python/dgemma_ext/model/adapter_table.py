"""The denoise pass's factors of several adapters, where a pass finds those of each canvas by an index on the device.

A captured step has the same products whichever adapters its rows have: ranks are padded with zeros to the largest, and
a canvas without an adapter has zeros. A layer's factors of one adapter are one row of a matrix, so that one gather
gives a layer's factors for all canvases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dgemma_ext.model.loaded_adapter import EXPERT_ATTRIBUTES, LoadedAdapter
from dgemma_ext.model.low_rank import LowRank, LowRanks

# Rows of a bfloat16 matrix whose address is a multiple of 16 bytes: what tensor cores read.
_RANK_MULTIPLE = 8


class _Place(NamedTuple):
    """Where a weight's factors begin in a row of a layer's matrix, and their sizes."""

    begin: int
    rank: int
    size_in: int
    size_out: int

    @property
    def middle(self) -> int:
        return self.begin + self.rank * self.size_in

    @property
    def end(self) -> int:
        return self.middle + self.rank * self.size_out


class AdapterTable:
    """Row 0 of every matrix is zeros, for canvases without an adapter; row_of: adapter → its row.

    Factors of experts are not in it: no captured step has them.
    """

    def __init__(self, adapters: Sequence[LoadedAdapter]) -> None:
        self.row_of = {adapter: row for row, adapter in enumerate(adapters, 1)}
        self._places: dict[int | None, dict[str, _Place]] = {}
        self._rows: dict[int | None, Tensor] = {}
        for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter.decoder.layers):
            found = [(row, adapter.decoder.of(layer)) for adapter, row in self.row_of.items()]
            places = self._places[layer] = _placed([factors for _, factors in found])
            some = next(factor for _, factors in found for factor in factors.values())
            size = max((place.end for place in places.values()), default=0)
            rows = self._rows[layer] = some.a.new_zeros(len(adapters) + 1, size)
            for row, factors in found:
                for name, place in places.items():
                    if name in factors:
                        a, b = _halves(rows[row : row + 1], place)
                        rank = factors[name].a.shape[0]
                        a[0, :rank].copy_(factors[name].a)
                        b[0, :, :rank].copy_(factors[name].b)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows.values())

    def of(self, layer: int | None, index: Tensor) -> LowRanks:
        """A layer's factors for canvases whose rows in the table are index, int64 [B]."""
        places = self._places.get(layer)
        if not places:
            return {}
        chosen = self._rows[layer].index_select(0, index)
        return {name: LowRank(*_halves(chosen, place)) for name, place in places.items()}


def _placed(all_factors: Sequence[LowRanks]) -> dict[str, _Place]:
    """Where each weight's factors stand in a row that has room for all of these."""
    places: dict[str, _Place] = {}
    begin = 0
    for name in dict.fromkeys(name for factors in all_factors for name in factors if name not in EXPERT_ATTRIBUTES):
        some = [factors[name] for factors in all_factors if name in factors]
        rank = -(-max(one.a.shape[0] for one in some) // _RANK_MULTIPLE) * _RANK_MULTIPLE
        places[name] = _Place(begin, rank, some[0].a.shape[1], some[0].b.shape[0])
        begin = places[name].end
    return places


def _halves(rows: Tensor, place: _Place) -> tuple[Tensor, Tensor]:
    """a [B, rank, in] and b [B, out, rank] in rows [B, ..]: views."""
    a = rows[:, place.begin : place.middle].unflatten(1, (place.rank, place.size_in))
    return a, rows[:, place.middle : place.end].unflatten(1, (place.size_out, place.rank))


@dataclass(frozen=True, eq=False)
class CanvasAdapters:
    """The adapters of a pass's canvases by an index on the device, int64 [B]: rows of the table."""

    table: AdapterTable
    index: Tensor

    def of(self, layer: int | None) -> LowRanks:
        return self.table.of(layer, self.index)
