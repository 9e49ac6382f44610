"""A denoising pass that takes tokens into the cache on its way.

A pass reads the same weights for many rows as for few, so what a canvas wants to see and is not in the cache yet (a
prompt, the canvas just finished) goes through the layers together with the canvas's first step and costs no pass of
its own. In every layer its keys and values are in the cache before the canvas looks there, and nothing of the canvas
reaches its rows: the numbers are those of an encode pass and a denoising pass in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dgemma_ext.checkpoint.config import LayerConfig
from dgemma_ext.model.layers import Rows

if TYPE_CHECKING:
    from dgemma_ext.diffusion_gemma import Attention, DiffusionGemma, RotaryTables
    from dgemma_ext.model.cache import Cache

# Up to so many tokens are encoded by the first step of the canvas that wants to see them. That saves one read of the
# weights, however many they are, and takes their memory at the same time as the canvases' (memory.py counts it).
JOINT_TOKENS = 1024


@dataclass(frozen=True)
class CanvasRows:
    """The rows of one or several canvases as they enter the first layer."""

    hidden: torch.Tensor  # [1, n, hidden]
    tables: RotaryTables  # of n positions
    whose: Rows
    attend: Attention  # over the cache as it will be
    idle: torch.Tensor | None = None  # bool [n, 1], rows that no expert is to see


@dataclass(frozen=True)
class Pending:
    """Tokens that follow what a slot holds."""

    slot: int
    ids: torch.Tensor  # int [1, n]


def last_hidden(
    model: DiffusionGemma, cache: Cache, canvas: CanvasRows, pending: Sequence[Pending] = ()
) -> torch.Tensor:
    """What the head takes: the last layer's output, normalised, [1, n, hidden]. `pending` are in the cache afterwards,
    each in a slot of its own."""
    rows, normed = _joined(model, cache, canvas, pending) if pending else canvas, None
    canvases = canvas.hidden.shape[1]
    hidden, taken = rows.hidden, rows.hidden.shape[1] - canvases
    for layer, weights in zip(model.config.layers, model.weights.layers, strict=True):
        tables = rows.tables[layer.rope, layer.head_dim]
        if taken and layer.index == len(model.config.layers) - 1:
            # Nobody looks at what follows the last layer's keys and values.
            for one, begin, end in _places(pending, canvases):
                of_one = (tables[0][begin:end], tables[1][begin:end]), None if normed is None else normed[:, begin:end]
                _, key, value = model._project(hidden[:, begin:end], layer, weights, *of_one)
                model._append(layer, key, value, cache, one.slot)
            hidden, normed = hidden[:, :canvases], None if normed is None else normed[:, :canvases]
            rows, taken, tables = canvas, 0, canvas.tables[layer.rope, layer.head_dim]
        hidden, normed = model._layer(
            hidden,
            layer,
            weights,
            tables,
            taken,
            rows.attend,
            normed,
            rows.whose,
            rows.idle,
        )
    for one in pending:
        cache.advance(one.slot, one.ids.shape[1])
    assert normed is not None, "a model has layers"
    return normed


def _joined(model: DiffusionGemma, cache: Cache, canvas: CanvasRows, pending: Sequence[Pending]) -> CanvasRows:
    """The rows of the canvases, then those of each pending piece."""
    tables = [canvas.tables]
    for one in pending:
        start = cache.length(one.slot)
        tables.append(model.rotary_tables(torch.arange(start, start + one.ids.shape[1], device=model.device)))
    idle = canvas.idle
    if idle is not None:
        taken = sum(one.ids.shape[1] for one in pending)
        idle = torch.cat((idle, idle.new_zeros(taken, 1)))
    causal = [model._causal_attention(cache, one.slot, None) for one in pending]

    def attend(layer: LayerConfig, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        canvases = canvas.hidden.shape[1]
        attended = [
            attend_one(layer, query[:, begin:end], key[:, begin:end], value[:, begin:end])
            for attend_one, (_, begin, end) in zip(causal, _places(pending, canvases), strict=True)
        ]
        # After them: it reads what they have appended.
        first = canvas.attend(layer, query[:, :canvases], key[:, :canvases], value[:, :canvases])
        return torch.cat((first, *attended), dim=1)

    return CanvasRows(
        hidden=torch.cat((canvas.hidden, *(model._embed(one.ids) for one in pending)), dim=1),
        tables={
            kind: (torch.cat([of[kind][0] for of in tables]), torch.cat([of[kind][1] for of in tables]))
            for kind in canvas.tables
        },
        whose=replace(canvas.whose, counts=(*canvas.whose.counts, *(one.ids.shape[1] for one in pending))),
        attend=attend,
        idle=idle,
    )


def _places(pending: Sequence[Pending], begin: int) -> list[tuple[Pending, int, int]]:
    """Each piece with its first row and the one after its last."""
    places = []
    for one in pending:
        places.append((one, begin, begin + one.ids.shape[1]))
        begin = places[-1][2]
    return places
