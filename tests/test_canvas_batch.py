"""One step of a batch of canvases: each row as it would be alone, finished rows frozen, empty ones not read."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

import dgemma_ext as dg
from backend import BACKEND
from dgemma_ext import SamplerConfig
from dgemma_ext.engine.group import bucket_of
from dgemma_ext.model import forward as forward_module
from dgemma_ext.model import matmul as matmul_module
from dgemma_ext.sampling import (
    CanvasBatch,
    CanvasState,
    StepBuffers,
    begin_canvas,
    denoising_step,
    make_canvas_batch,
    make_step_buffers,
)
from models import begun, random_model, step_alone

DTYPES = [torch.float32, torch.bfloat16] if BACKEND == "cpu" else [torch.bfloat16]


def canvases_begun(
    model: dg.DiffusionGemma, cache: dg.Cache, prompts: list[list[int]], caps: list[int], confidence: float = 0.0
) -> tuple[CanvasBatch, StepBuffers, list[tuple[CanvasBatch, StepBuffers]]]:
    """Encodes every prompt into its own slot and begins its canvas, which runs to its cap with a confidence of 0.

    Returns a batch of four rows, its buffers, and the same canvases in batches of their own.
    """
    network, alone = model.network, []
    batch = make_canvas_batch(network, 4, 8)
    for slot, (prompt, cap) in enumerate(zip(prompts, caps, strict=True)):
        model.encode(torch.tensor([prompt]), cache, slots=[slot])
        settings = SamplerConfig(
            max_denoising_steps=cap, entropy_bound=6.0, t_max=0.1, t_min=0.01, confidence_threshold=confidence
        )
        resolved = settings.resolve(model.defaults, 8)
        contents = {
            1: dg.Canvas([*[None] * 8, 9, None, 11], [*[False] * 8, True, False, True]),
            2: dg.Canvas(allowed=[*[None] * 17, [3, 4], [7, 8, 9]]),
        }
        begin_canvas(network, batch, slot, resolved, 100 + slot, slot, contents.get(slot))
        tables = network.rotary_tables(torch.arange(len(prompt), len(prompt) + 8))
        batch.place(slot, slot, len(prompt), tables)
        alone.append(begun(model, resolved, 100 + slot, slot, contents.get(slot)))
    return batch, make_step_buffers(network, 4, 8), alone


def of_row(batch: CanvasBatch, row: int) -> dict[str, torch.Tensor]:
    """A copy of all tensors of a row."""
    state = batch.state.rows_between(row, row + 1)
    return {f.name: getattr(state, f.name)[0].clone() for f in fields(CanvasState) if f.name != "allowed"}


PROMPTS = [[1, 2, 3], list(range(20)), [5] * 9]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_steps_every_canvas_as_it_would_be_alone(dtype: torch.dtype) -> None:
    model = random_model(dtype)
    cache = model.new_cache(4, 64)
    batch, buffers, canvases = canvases_begun(model, cache, PROMPTS, [2, 5, 4], confidence=4.0)
    for _ in range(5):
        denoising_step(model.network, cache, batch, buffers)
        for row, canvas in enumerate(canvases):
            alone = canvas[0].state
            if bool(alone.active):
                step_alone(model, cache, row, canvas)
            for name in ("canvas", "draft", "accepted", "entropy", "mean_entropy", "step", "temperature", "status"):
                assert torch.equal(getattr(alone, name)[0], getattr(batch.state, name)[row]), (row, name)
    assert not batch.state.active.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_finished_row_is_frozen_and_an_empty_one_is_not_read(dtype: torch.dtype) -> None:
    model = random_model(dtype)
    cache = model.new_cache(4, 64)
    batch, buffers, _ = canvases_begun(model, cache, PROMPTS, [1, 2, 6])
    # A row without a request does not affect the others, not even with NaN.
    buffers.logits[3].fill_(float("nan"))
    for tensor in buffers.statistics_of(batch.state):
        if tensor.is_floating_point():
            tensor[3] = float("nan")
    kept = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    denoising_step(model.network, cache, batch, buffers)
    frozen = {0: of_row(batch, 0), 3: of_row(batch, 3)}
    for _ in range(3):
        denoising_step(model.network, cache, batch, buffers)
        frozen.setdefault(1, of_row(batch, 1))
        for row, then in frozen.items():
            for name, value in of_row(batch, row).items():
                assert torch.equal(value.reshape(-1).view(torch.uint8), then[name].reshape(-1).view(torch.uint8)), name
    assert batch.state.active.tolist() == [False, False, True, False]
    assert batch.state.step.tolist() == [2, 3, 5, 0]
    assert torch.isfinite(batch.state.mean_entropy).all()
    for tensor, then in zip((*cache.keys, *cache.values), kept, strict=True):
        assert torch.equal(tensor.view(torch.uint8), then.view(torch.uint8)), "a denoising step only reads the cache"


def test_experts_and_attention_see_no_row_that_is_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    cache = model.new_cache(4, 64)
    batch, buffers, _ = canvases_begun(model, cache, PROMPTS, [1, 2, 6])
    seen, slots = [], []
    original, attention = matmul_module.experts, forward_module.canvas_attention

    def spy(rows: torch.Tensor, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((ids.view(4, 8, -1) >= 0).flatten(1).all(1).tolist())
        assert ((ids >= 0).view(4, -1).all(1) | (ids < 0).view(4, -1).all(1)).all()
        return original(rows, ids, *rest)

    def spy_on_slots(*operands: torch.Tensor, **more: Any) -> torch.Tensor:
        slots.append(more["slot"].tolist())
        return attention(*operands, **more)

    monkeypatch.setattr(matmul_module, "experts", spy)
    monkeypatch.setattr(forward_module, "canvas_attention", spy_on_slots)
    denoising_step(model.network, cache, batch, buffers)
    denoising_step(model.network, cache, batch, buffers)
    layers = len(model.config.layers)
    assert seen == [[True, True, True, False]] * layers + [[False, True, True, False]] * layers
    assert slots == [[0, 1, 2, -1]] * layers + [[-1, 1, 2, -1]] * layers


def test_a_row_keeps_its_canvas_when_it_moves() -> None:
    model = random_model()
    cache = model.new_cache(4, 64)
    batch, buffers, canvases = canvases_begun(model, cache, PROMPTS, [6, 6, 6])
    denoising_step(model.network, cache, batch, buffers)
    before = of_row(batch, 2)
    table = next(iter(batch.rotary.values()))[0][16:24].clone()
    assert before["allowed_row"].tolist() == [-1, 16, 17, *[-1] * 5]
    batch.move(2, 0, masks=2)
    batch.clear(2)
    # The masks move with the row.
    assert batch.state.allowed_row[0].tolist() == [-1, 0, 1, *[-1] * 5]
    assert torch.equal(batch.state.allowed[:2], canvases[2][0].state.allowed[:2])
    after = of_row(batch, 0)
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "allowed_row")
    assert torch.equal(next(iter(batch.rotary.values()))[0][:8], table)
    assert batch.slot.tolist() == [2, 1, -1, -1]
    assert batch.prefix_length.tolist()[:2] == [9, 20]
    assert batch.state.active.tolist() == [True, True, False, False]


def test_the_bytes_of_a_batch_are_those_that_it_takes() -> None:
    network = random_model().network
    for make in (make_canvas_batch, make_step_buffers):
        assert make(network, 4, 8).nbytes == make(network, 4, 8, device="meta").nbytes
    assert [bucket_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 17, 32)] == [1, 2, 4, 4, 8, 8, 16, 32, 32]
