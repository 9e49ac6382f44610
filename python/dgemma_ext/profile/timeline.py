"""The measured times of a pass: slices of operators, their sums by part, and the floors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from dgemma_ext.profile.count import Operation, total
from dgemma_ext.profile.machine import Machine
from dgemma_ext.profile.parts import Part


@dataclass(frozen=True)
class Slice:
    """One timed operator call: `begin` and `end` on its clock, the `seconds` that count for it, the number of the
    recorded pass (`repeat`), and the names of its `kernels` on a GPU."""

    part: Part
    name: str
    layer: int | None
    begin: float
    end: float
    seconds: float
    repeat: int
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A part of a pass: mean seconds, bytes, FLOPs, and `floor`, the least seconds that these take. The last three are
    None for a part that is not counted."""

    part: Part
    seconds: float
    bytes: float | None = None
    flops: float | None = None
    floor: float | None = None

    @property
    def ratio(self) -> float | None:
        """The seconds as a multiple of the floor."""
        return None if self.floor is None or self.floor == 0 else self.seconds / self.floor


def ratio_text(ratio: float) -> str:
    """A ratio with two decimals below 10, one below 100, none above."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"


@dataclass(frozen=True)
class Pass:
    """A denoising step, or an encode pass, as the mean of `repeats` runs.

    seconds: the sum of the rows. unwatched_seconds: the time of an unrecorded run. between: the seconds in no operator.
    spans: begin and end of each repeat on the slices' clock; each slice is inside the span of its repeat.
    """

    seconds: float
    unwatched_seconds: float
    between: float
    rows: tuple[Row, ...]
    operations: tuple[Operation, ...]
    slices: tuple[Slice, ...]
    spans: tuple[tuple[float, float], ...]
    machine: Machine

    @property
    def repeats(self) -> int:
        return len(self.spans)

    @property
    def floor(self) -> float:
        """The least seconds that the counted parts take."""
        return sum(row.floor or 0.0 for row in self.rows)

    def work_of(self, piece: Slice) -> tuple[float, float, float] | None:
        """Bytes, FLOPs and floor in seconds of one call; None for a call that is not counted. Calls that share an
        operation (requests that take turns) share its work."""
        operation = self._by_name.get((piece.name, piece.layer))
        if operation is None:
            return None
        share = self.repeats / self._calls[piece.name, piece.layer]
        moved, flops = total([operation])
        return moved * share, sum(flops.values()) * share, self.machine.floor(moved, flops) * share

    @cached_property
    def _by_name(self) -> dict[tuple[str, int | None], Operation]:
        return {(operation.name, operation.layer): operation for operation in self.operations}

    @cached_property
    def _calls(self) -> Counter[tuple[str, int | None]]:
        return Counter((piece.name, piece.layer) for piece in self.slices)


def rows_of(
    slices: Iterable[Slice], operations: Sequence[Operation], machine: Machine, seconds: float, repeats: int
) -> tuple[tuple[Row, ...], float]:
    """The rows of a pass that took `seconds`, and the seconds that are in no slice.

    The last row is the rest, with the time between operators: the rows sum to `seconds`.
    """
    measured = dict.fromkeys(Part, 0.0)
    for piece in slices:
        measured[piece.part] += piece.seconds / repeats
    rows = []
    for part in Part:
        counted = [operation for operation in operations if operation.part is part]
        if part is Part.OTHER or not (counted or measured[part]):
            continue
        moved, flops = total(counted)
        rows.append(Row(part, measured[part], moved, sum(flops.values()), machine.floor(moved, flops)))
    rest = seconds - sum(row.seconds for row in rows)
    rows.append(Row(Part.OTHER, rest))
    return tuple(rows), rest - measured[Part.OTHER]
