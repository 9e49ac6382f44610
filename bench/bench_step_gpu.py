"""A whole denoising step, and its parts, of the true-size random model on a GPU.

    make gpu-check ARGS="--part bench -k step"

`bench_step` runs one request's step launch by launch: what the host takes beyond the GPU's time shows. `bench_canvas`
runs whole canvases as the scheduler does, by each of its drivers. Goals are for one H200, a canvas of 256 tokens,
bfloat16.
"""

from __future__ import annotations

import time
from functools import cache

import pytest
import torch
from gpu_clock import Work, record
from pytest_benchmark.fixture import BenchmarkFixture
from true_size import random_model, true_config

import dgemma_ext as dg
from dgemma_ext.engine.group import CanvasGroup
from dgemma_ext.engine.loop import LOOPS, loop_for
from dgemma_ext.model import MatmulMode
from dgemma_ext.ops.vocabulary_head import vocabulary_head
from dgemma_ext.sampling import begin_canvas, denoising_step, make_canvas_batch, make_step_buffers
from dgemma_ext.sampling.step import logits_params, sample_and_update, soft_embedding

# The table is read for the head, and again for the soft embedding.
HEAD_BYTES = 2.0 * 262_144 * 2816

pytestmark = pytest.mark.gpu


@cache
def model(experts_hit: int, weights: str = "bfloat16") -> dg.DiffusionGemma:
    model.cache_clear()  # two do not fit at the same time
    torch.cuda.empty_cache()
    return random_model(true_config(), experts_hit=experts_hit, weights=weights)


# Goals in microseconds, by format and experts hit.
GOALS = {
    "bfloat16": {84: 12_000.0, 128: 15_500.0},
    "fp8": {84: 7_500.0, 128: 9_500.0},
    "int4": {84: 7_000.0, 128: 8_000.0},
}


@pytest.mark.parametrize("prefix", [128, 8192])
@pytest.mark.parametrize("experts_hit", [84, 128])
@pytest.mark.parametrize("weights", list(GOALS))
def bench_step(benchmark: BenchmarkFixture, weights: str, experts_hit: int, prefix: int) -> None:
    made = model(experts_hit, weights)
    torch.cuda.reset_peak_memory_stats()
    cache = made.new_cache(1, prefix)
    ids = torch.randint(0, made.config.vocab_size, (1, prefix), generator=torch.Generator().manual_seed(1))
    made.encode(ids, cache)
    resolved = dg.SamplerConfig(confidence_threshold=0.0).resolve(made.defaults, 256)
    network = made.network
    batch, buffers = make_canvas_batch(network, 1, 256), make_step_buffers(network, 1, 256)
    begin_canvas(network, batch, 0, resolved, seed=0, index=0)
    positions = torch.arange(prefix, prefix + 256, device=made.device)
    batch.place(0, 0, prefix, network.rotary_tables(positions))
    denoising_step(network, cache, batch, buffers)

    def step() -> None:
        batch.state.step.fill_(2)
        batch.state.active.fill_(True)
        denoising_step(network, cache, batch, buffers)

    # Quantized weights count in their format, and experts by the share that is hit.
    experts = sum(layer.experts_gate_up.nbytes + layer.experts_down.nbytes for layer in made.weights.layers)
    others = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "router_proj")
    kept = [getattr(layer, name) for layer in made.weights.layers for name in others]
    dense = sum(weight.nbytes for weight in kept if weight is not None)
    work = Work(bytes=experts * experts_hit / 128 + dense + 2 * HEAD_BYTES)
    benchmark.extra_info["gigabytes_allocated"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    record(benchmark, step, work, GOALS[weights][experts_hit], rounds=10, with_host=True)


@pytest.mark.parametrize("prefix", [128, 8192])
def bench_batch_invariant_step(benchmark: BenchmarkFixture, prefix: int) -> None:
    """The cost of `batch_invariant=True`: the step of bench_step[bfloat16-128-...] with our own dense products."""
    made = model(128)
    made.network.options.matmul = MatmulMode.INVARIANT
    try:
        bench_step(benchmark, "bfloat16", 128, prefix)
    finally:
        made.network.options.matmul = MatmulMode.BATCHED


@pytest.mark.parametrize("peaked", [False, True], ids=["flat", "peaked"])
def bench_head_to_soft_embedding(benchmark: BenchmarkFixture, peaked: bool) -> None:
    """Head, statistics, sampling, acceptance and soft embedding: the part of a step after its layers."""
    made = random_model(true_config(layers=1), final_norm=1.0 if peaked else 0.05)
    resolved = dg.SamplerConfig(confidence_threshold=0.0).resolve(made.defaults, 256)
    network = made.network
    batch, buffers = make_canvas_batch(network, 1, 256), make_step_buffers(network, 1, 256)
    begin_canvas(network, batch, 0, resolved, seed=0, index=0)
    state, cache = batch.state, made.new_cache(1, 256)
    hidden = network.forward(cache, network.canvas_in_slot(state.canvas, cache, 0))
    assert hidden is not None

    def step() -> None:
        state.step.fill_(2)
        state.active.fill_(True)
        params, statistics = logits_params(network, state, buffers), buffers.statistics_of(state)
        vocabulary_head(hidden, network.weights.embed_tokens, **params, logits=buffers.logits, out=statistics)
        sample_and_update(network, state, buffers, params)
        soft_embedding(network, state, buffers, params)

    operations = 2.0 * 256 * 262_144 * 2816
    work = Work(bytes=2 * HEAD_BYTES, operations=2 * operations)
    record(benchmark, step, work, 800.0 if peaked else 1350.0)


CANVAS_STEPS = 16


@pytest.mark.parametrize("requests", [1, 4])
@pytest.mark.parametrize("driver", list(LOOPS))
def bench_canvas(benchmark: BenchmarkFixture, driver: str, requests: int) -> None:
    """Canvases of 16 steps by a driver: wall microseconds for each step, and the host's part to queue one. "eager"
    launches a step's kernels one by one; the other drivers replay a captured step."""
    made = model(84)
    scheduler = dg.Scheduler(made, requests, 1024, driver=driver)
    sampler = dg.SamplerConfig(confidence_threshold=0.0, max_denoising_steps=CANVAS_STEPS)
    for seed in range(requests):
        scheduler.submit(list(range(5, 133)), made.config.canvas_length, sampler, seed)
    scheduler.step()
    (group,) = scheduler._groups.values()
    assert isinstance(group, CanvasGroup)
    runner, state = group.runner(), group._batch.state

    def canvas() -> None:
        state.step.fill_(1)
        state.status.zero_()
        state.active[:requests].fill_(True)
        loop_for(runner, driver)(runner, requests, CANVAS_STEPS, ())

    canvas()
    queued = []
    for _ in range(10):
        state.active.fill_(False)  # no row is active, so the GPU keeps up and the host does not wait for it
        torch.cuda.synchronize()
        began = time.perf_counter()
        runner.step()
        queued.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(5):
        canvas()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - began) / 5 / CANVAS_STEPS
    benchmark.extra_info.update(microseconds=wall * 1e6, host_microseconds=sorted(queued)[5] * 1e6)
    benchmark.pedantic(canvas, rounds=3)
