"""Small random models for tests, loaded once per process."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

import dgemma_ext as dg
from checkpoints import make_checkpoint
from dgemma_ext.model import Network, PrefillChunk
from dgemma_ext.model.forward import decoder_layer, embed
from dgemma_ext.model.rows import Rows
from dgemma_ext.ops.layer import rms_norm
from dgemma_ext.sampling import (
    CanvasBatch,
    CanvasState,
    ResolvedSampler,
    StepBuffers,
    begin_canvas,
    denoising_step,
    make_canvas_batch,
    make_step_buffers,
)


@cache
def random_model(dtype: torch.dtype = torch.float32, weights: str = "auto", **sizes: Any) -> dg.DiffusionGemma:
    """A model of the given sizes (tests/checkpoints.py) with a tokenizer; the same object for the same arguments."""
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), dtype=torch.float32, **sizes)
        # Converting copies the weights, so the folder may be deleted.
        model = dg.DiffusionGemma.from_pretrained(folder, device="cpu", dtype=torch.bfloat16, weights=weights)
        if dtype == torch.bfloat16:
            return model
        return dg.DiffusionGemma.from_pretrained(folder, device="cpu", dtype=dtype, weights=weights)


def smallest_model() -> dg.DiffusionGemma:
    """A model so small that a denoising step takes mostly Python time, for thousands of schedules."""
    return random_model(
        layers=("sliding_attention", "full_attention"),
        hidden=16,
        intermediate=16,
        moe_intermediate=8,
        experts=2,
        top_k=1,
        vocabulary=300,
        heads=2,
        kv_heads=1,
        head_dim=8,
        global_head_dim=8,
        window=6,
        canvas=4,
        max_positions=64,
        with_tokenizer=False,
    )


def begun(
    model: dg.DiffusionGemma,
    sampler: ResolvedSampler,
    seed: int,
    index: int,
    content: dg.Canvas | None = None,
    length: int | None = None,
) -> tuple[CanvasBatch, StepBuffers]:
    """Begins canvas `index` of a request in a new batch."""
    length = length or sampler.canvas_length
    batch = make_canvas_batch(model.network, 1, length)
    begin_canvas(model.network, batch, 0, sampler, seed, index, content)
    return batch, make_step_buffers(model.network, 1, length)


def step_alone(
    model: dg.DiffusionGemma, cache: dg.Cache, slot: int, canvas: tuple[CanvasBatch, StepBuffers]
) -> CanvasState:
    """One denoising step of a single canvas over its slot; returns its state."""
    batch, buffers = canvas
    prefix = cache.length(slot)
    batch.place(0, slot, prefix, model.network.rotary_tables(torch.arange(prefix, prefix + batch.length)))
    is_first = int(batch.state.draft[0, 0]) < 0
    denoising_step(model.network, cache, batch, buffers, self_conditioned=not is_first)
    return batch.state


def head_input(
    model: dg.DiffusionGemma,
    canvas: torch.Tensor,
    cache: dg.Cache,
    slot: int,
    soft_embedding: torch.Tensor | None,
    appended: torch.Tensor | None = None,
) -> torch.Tensor:
    """The head's input for a canvas [1, L] over the slot and over tokens [1, n] that the same pass encodes."""
    chunks = [] if appended is None else [PrefillChunk(slot, appended[0])]
    count = sum(map(len, chunks))
    rows = model.network.canvas_in_slot(canvas, cache, slot, soft_embedding, appended=count)
    hidden = model.network.forward(cache, rows, chunks)
    assert hidden is not None
    return hidden


def canvas_rows(network: Network, cache: dg.Cache, canvas: torch.Tensor, soft: torch.Tensor | None = None) -> Rows:
    """The rows of a denoising pass of a canvas [1, L] over slot 0."""
    return Rows.describe(network.canvas_in_slot(canvas, cache, 0, soft), (), cache, network.config, network.dtype)


def layer_alone(network: Network, cache: dg.Cache, rows: Rows, hidden: torch.Tensor, index: int) -> torch.Tensor:
    """The output of a single layer for its input [1, n, hidden]."""
    layer, weights = network.config.layers[index], network.weights.layers[index]
    normed = rms_norm(hidden[0], weights.input_layernorm, network.config.rms_norm_eps)
    made = (layer, weights, network.weights.norm, network.config, network.options, cache)
    return decoder_layer(hidden[0], normed, rows, *made)[0][None]


def first_input(network: Network, rows: Rows) -> torch.Tensor:
    """The input of the first layer, [1, n, hidden]."""
    return embed(rows, network.weights, network.options, network.config.rms_norm_eps)[None]
