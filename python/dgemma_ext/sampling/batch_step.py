"""One denoising step of a batch of canvases: one pass, whatever the requests' steps, prefixes and settings.

The same operations as sampler.denoising_step, request by request the same bits on the CPU. Nothing here looks at a
value, allocates what outlives the step, or depends on how many rows are in use: a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dgemma_ext.model.joint_pass import CanvasRows, Pending, last_hidden
from dgemma_ext.ops import block_attention
from dgemma_ext.ops.vocabulary_head import vocabulary_head
from dgemma_ext.sampling.canvas_batch import CanvasBatch
from dgemma_ext.sampling.sampler import decide, embed_softly

if TYPE_CHECKING:
    from dgemma_ext.checkpoint.config import LayerConfig
    from dgemma_ext.diffusion_gemma import DiffusionGemma
    from dgemma_ext.model.cache import Cache


def batch_step(model: DiffusionGemma, cache: Cache, batch: CanvasBatch, pending: Sequence[Pending] = ()) -> None:
    """Advances every active row by one denoising step, in place; other rows stay as they are.

    pending: tokens that the same pass encodes, each for a row that counts them to its prefix. Such a step is not for a
    graph: its shapes are those of the tokens.

    A row's first step has a soft embedding of zeros, which is what none means. Rows that are not active cost their
    part of the dense products: attention, experts, head and all after it leave them out.
    """
    state = batch.state
    hidden = _last_hidden(model, cache, batch, pending)
    # The update writes the next step's temperature over this one's, which the soft embedding still reads.
    batch.temperature.copy_(state.temperature)
    reading: dict[str, Any] = {
        "softcap": model.config.final_logit_softcapping,
        "temperature": batch.temperature,
        "active": state.active,
        "allowed": None,
        "allowed_row": None,
    }
    raw, statistics = vocabulary_head(
        hidden, model.weights.embed_tokens, **reading, logits=batch.logits, out=batch.statistics
    )
    decide(model, state, raw, reading, statistics, sampled=batch.sampled)
    # Of those that go on: a finished canvas needs no self-conditioning.
    embed_softly(model, state, raw, reading, statistics, out=state.soft_embedding, workspace=batch.workspace)


def _last_hidden(model: DiffusionGemma, cache: Cache, batch: CanvasBatch, pending: Sequence[Pending]) -> torch.Tensor:
    """What the head takes: the last layer's output, normalised, [B, L, hidden]."""
    state, shape = batch.state, (batch.rows, batch.length)
    idle = state.active.logical_not()
    slot = batch.slot.masked_fill(idle, -1)
    idle_rows = idle[:, None].expand(shape).reshape(-1, 1)

    def attend(layer: LayerConfig, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = batch.attended[layer.head_dim]
        block_attention.canvas_attention(
            query[0].unflatten(0, shape),
            key[0].unflatten(0, shape),
            value[0].unflatten(0, shape),
            cache.keys[layer.index],
            cache.values[layer.index],
            slot,
            batch.prefix_length,
            window=layer.sliding_window,
            out=out,
        )
        return out.flatten(0, 1)[None]

    rows = CanvasRows(
        hidden=model._canvas_input(state.canvas, state.soft_embedding),
        tables=batch.tables,
        whose=model._rows(*[batch.length] * batch.rows),
        attend=attend,
        idle=idle_rows,
    )
    return last_hidden(model, cache, rows, pending)[0].unflatten(0, shape)
