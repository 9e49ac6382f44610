"""The rows of a forward pass: canvases that are denoised, and chunks of tokens that are encoded.

A pass reads the same weights for many rows as for few, so one pass may have both: what a canvas is to see and is not in
the cache yet (a prompt, the canvas just finished) goes through the layers together with the canvas's first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dgemma_ext.checkpoint import ModelConfig
from dgemma_ext.model.cache import Cache
from dgemma_ext.model.layers import RotaryTables, rotary_tables

# Up to so many tokens are encoded by the first step of the canvas that is to see them. That saves one read of the
# weights, however many they are, and takes their memory at the same time as the canvases' (engine/memory.py counts it).
MAX_PREFILL_TOKENS = 1024


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens that a pass appends to the cache. Each sees what its slot holds and, causally, the chunk itself.

    spans: int32 [1, spans, 2], ranges of absolute positions whose tokens see each other whole.
    """

    slot: int
    ids: Tensor  # int [n]
    spans: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]


@dataclass(frozen=True)
class Canvases:
    """B canvases of L tokens. Every token sees the prefix of its canvas and the whole canvas; nothing is stored.

    The prefix includes the chunks that the same pass encodes. A canvas whose slot is -1 is skipped by attention and
    experts; its rows only take part in dense products.
    """

    ids: Tensor  # int [B, L]
    slot: Tensor  # int32 [B]
    prefix_length: Tensor  # int32 [B]
    rotary: RotaryTables  # of the B * L positions
    soft_embedding: Tensor | None = None  # [B, L, hidden], the self-conditioning; None is exact zero
    # Attention is written here, [B, L, heads, head_dim] by head dimension. None allocates.
    attention_out: dict[int, Tensor] | None = None

    @property
    def rows(self) -> int:
        return self.ids.numel()


@dataclass(frozen=True)
class Rows:
    """All rows of a pass in their order: those of the canvases, then those of each chunk."""

    canvases: Canvases | None
    chunks: tuple[PrefillChunk, ...]
    rotary: RotaryTables  # of all rows
    # int32 [1] for each chunk: its slot, and how many positions that slot held before the pass.
    chunk_slot: tuple[Tensor, ...] = ()
    chunk_start: tuple[Tensor, ...] = ()
    # bool [rows, 1], True where no expert is to see the row.
    skipped: Tensor | None = None

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
            # Filled on the device: a copy from the host would wait for what runs there.
            chunk_slot=tuple(torch.full((1,), one.slot, dtype=torch.int32, device=device) for one in chunks),
            chunk_start=tuple(torch.full((1,), start, dtype=torch.int32, device=device) for start in starts),
            skipped=skipped,
        )

    def canvases_alone(self) -> Rows:
        """The same pass without its chunks."""
        assert self.canvases is not None
        skipped = None if self.skipped is None else self.skipped[: self.canvas_rows]
        return replace(self, chunks=(), rotary=self.canvases.rotary, chunk_slot=(), chunk_start=(), skipped=skipped)

    @property
    def canvas_rows(self) -> int:
        return 0 if self.canvases is None else self.canvases.rows

    @property
    def chunk_rows(self) -> int:
        return sum(map(len, self.chunks))

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each request in turn."""
        of_canvases = () if self.canvases is None else (self.canvases.ids.shape[1],) * self.canvases.ids.shape[0]
        return (*of_canvases, *map(len, self.chunks))

    def chunk_slices(self) -> list[slice]:
        """Where the rows of each chunk are."""
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
