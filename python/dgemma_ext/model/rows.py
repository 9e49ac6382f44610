"""The rows of a forward pass: canvases to denoise, and chunks of tokens to encode.

One pass may have both: tokens that a canvas sees and that are not in the cache yet (a prompt, the canvas just finished)
are encoded by the canvas's first step, which saves one read of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dgemma_ext.checkpoint import ModelConfig
from dgemma_ext.model.adapter_table import CanvasAdapters
from dgemma_ext.model.cache import Cache
from dgemma_ext.model.layers import RotaryTables, rotary_tables
from dgemma_ext.model.loaded_adapter import LoadedAdapter
from dgemma_ext.model.low_rank import NO_FACTORS, LowRanks, Side

# The most tokens that a canvas's first step encodes. They take memory at the same time as the canvases
# (engine/memory.py counts it), so a longer prompt is encoded by passes of its own.
MAX_PREFILL_TOKENS = 1024


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens that a pass appends to the cache. Each sees its slot's positions and, causally, the chunk itself.

    sliding_spans, full_spans: int32 [1, spans, 2], ranges of absolute positions whose tokens all see each other, on
    layers of either kind. features: (offset, [k, hidden]), what stands in place of the embeddings of k tokens.
    adapter: whose factors for the encode pass stand beside the weights.
    """

    slot: int
    ids: Tensor  # int [n]
    sliding_spans: Tensor | None = None
    full_spans: Tensor | None = None
    features: tuple[tuple[int, Tensor], ...] = ()
    adapter: LoadedAdapter | None = None

    def factors(self, layer: int | None) -> LowRanks:
        return NO_FACTORS if self.adapter is None else self.adapter.encoder.of(layer)

    def side(self, layer: int) -> Side | None:
        """What stands beside a layer's weights for the chunk by itself."""
        factors = self.factors(layer)
        return Side((factors,)) if factors else None

    def __len__(self) -> int:
        return self.ids.shape[0]


@dataclass(frozen=True)
class Canvases:
    """B canvases of L tokens. Every token sees the prefix of its canvas and the whole canvas; nothing is stored.

    The prefix includes the chunks that the same pass encodes. A canvas whose slot is -1 is skipped by attention and
    experts; its rows only take part in dense products.

    adapters: whose factors for the denoise pass stand beside the weights, one for each canvas; empty for none.
    adapter_rows: the same on the device, where one product has the rows of all canvases.
    """

    ids: Tensor  # int [B, L]
    slot: Tensor  # int32 [B]
    prefix_length: Tensor  # int32 [B]
    rotary: RotaryTables  # of the B * L positions
    soft_embedding: Tensor | None = None  # [B, L, hidden], the self-conditioning; None is exact zero
    # Head dimension → buffer for the attention's output, [B, L, heads, head_dim]. None allocates one.
    attention_out: dict[int, Tensor] | None = None
    adapters: tuple[LoadedAdapter | None, ...] = ()
    adapter_rows: CanvasAdapters | None = None

    @property
    def rows(self) -> int:
        return self.ids.numel()


@dataclass(frozen=True)
class Rows:
    """All rows of a pass in their order: those of the canvases, then those of each chunk."""

    canvases: Canvases | None
    chunks: tuple[PrefillChunk, ...]
    rotary: RotaryTables  # of all rows
    chunk_slot: tuple[Tensor, ...] = ()  # int32 [1] for each chunk: its slot
    chunk_start: tuple[Tensor, ...] = ()  # int32 [1] for each chunk: the length of its slot before the pass
    positions: tuple[int, ...] = ()  # the same lengths on the host
    skipped: Tensor | None = None  # bool [rows, 1], True for rows that no expert computes

    @classmethod
    def describe(
        cls,
        canvases: Canvases | None,
        chunks: Sequence[PrefillChunk],
        cache: Cache,
        config: ModelConfig,
        dtype: torch.dtype,
    ) -> Self:
        device = cache.device
        starts = [cache.length(chunk.slot) for chunk in chunks]
        tables = [] if canvases is None else [canvases.rotary]
        for chunk, start in zip(chunks, starts, strict=True):
            tables.append(rotary_tables(config, torch.arange(start, start + len(chunk), device=device), dtype))
        skipped = None
        if canvases is not None:
            skipped = (canvases.slot < 0)[:, None].expand(canvases.ids.shape).reshape(-1, 1)
            if chunks:
                skipped = torch.cat((skipped, skipped.new_zeros(sum(map(len, chunks)), 1)))
        return cls(
            canvases=canvases,
            chunks=tuple(chunks),
            rotary=_joined(tables),
            # Filled on the device, because a copy from the host would wait for the work that is queued there.
            chunk_slot=tuple(torch.full((1,), one.slot, dtype=torch.int32, device=device) for one in chunks),
            chunk_start=tuple(torch.full((1,), start, dtype=torch.int32, device=device) for start in starts),
            positions=tuple(starts),
            skipped=skipped,
        )

    def canvases_alone(self) -> Rows:
        """The same pass without its chunks."""
        assert self.canvases is not None
        skipped = None if self.skipped is None else self.skipped[: self.canvas_rows]
        rotary = self.canvases.rotary
        return replace(self, chunks=(), rotary=rotary, chunk_slot=(), chunk_start=(), positions=(), skipped=skipped)

    @property
    def canvas_rows(self) -> int:
        return 0 if self.canvases is None else self.canvases.rows

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of rows of each request in turn."""
        canvases = () if self.canvases is None else (self.canvases.ids.shape[1],) * self.canvases.ids.shape[0]
        return (*canvases, *map(len, self.chunks))

    @property
    def starts(self) -> tuple[int | None, ...]:
        """For each request in turn the position of its first row, None for a canvas."""
        canvases = () if self.canvases is None else (None,) * self.canvases.ids.shape[0]
        return (*canvases, *self.positions)

    def side(self, layer: int | None) -> Side | None:
        """What stands beside a layer's weights, None where nothing does. layer None: the self-conditioning."""
        canvases = self.canvases
        factors: list[LowRanks] = []
        by_canvas = None
        if canvases is not None:
            adapters = canvases.adapters or (None,) * canvases.ids.shape[0]
            factors += [NO_FACTORS if adapter is None else adapter.decoder.of(layer) for adapter in adapters]
            by_canvas = None if canvases.adapter_rows is None else canvases.adapter_rows.of(layer)
        factors += [chunk.factors(layer) for chunk in self.chunks]
        return Side(tuple(factors), by_canvas) if any(factors) or by_canvas else None

    def chunk_slices(self) -> list[slice]:
        """The rows of each chunk."""
        slices, begin = [], self.canvas_rows
        for chunk in self.chunks:
            slices.append(slice(begin, begin + len(chunk)))
            begin += len(chunk)
        return slices


def _joined(tables: Sequence[RotaryTables]) -> RotaryTables:
    if len(tables) == 1:
        return tables[0]
    return {
        kind: (torch.cat([one[kind][0] for one in tables]), torch.cat([one[kind][1] for one in tables]))
        for kind in tables[0]
    }
