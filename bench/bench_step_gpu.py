"""A whole denoising step, and its parts, of the true-size random model on a GPU.

    make gpu-check ARGS="--part bench -k step"

The step runs as the scheduler runs it, launch by launch: what the host takes beyond the GPU's time shows. Goals are for
one H200, a canvas of 256 tokens, bfloat16.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from gpu_clock import Work, record
from pytest_benchmark.fixture import BenchmarkFixture
from true_size import random_model, true_config

import dgemma_ext as dg
from dgemma_ext.sampler import begin_canvas, denoising_step

# 30 layers, all experts, head and embedding once, and the same again for the soft embedding.
EXPERT_BYTES = 2.0 * 3 * 2816 * 704
SLIDING_BYTES = 2.0 * 2816 * 2 * (4096 + 2048)
FULL_BYTES = 2.0 * 2816 * (2 * 8192 + 1024)
DENSE_BYTES = 2.0 * 30 * 2816 * (3 * 2112 + 128) + 25 * SLIDING_BYTES + 5 * FULL_BYTES
HEAD_BYTES = 2.0 * 262_144 * 2816

pytestmark = pytest.mark.gpu


@cache
def model(experts_hit: int) -> dg.DiffusionGemma:
    model.cache_clear()  # one at a time fits
    torch.cuda.empty_cache()
    return random_model(true_config(), experts_hit=experts_hit)


@pytest.mark.parametrize("prefix", [128, 8192])
@pytest.mark.parametrize(("experts_hit", "goal"), [(84, 12_000.0), (128, 15_500.0)])
def bench_step(benchmark: BenchmarkFixture, experts_hit: int, goal: float, prefix: int) -> None:
    made = model(experts_hit)
    cache = made.new_cache(1, prefix)
    ids = torch.randint(0, made.config.vocab_size, (1, prefix), generator=torch.Generator().manual_seed(1))
    made.encode(ids, cache)
    resolved = dg.SamplerConfig(confidence_threshold=0.0).resolve(made.defaults, 256)
    state = begin_canvas(made, resolved, seed=0, index=0)
    logits = torch.empty(1, 256, made.config.vocab_size, dtype=made.dtype, device=made.device)
    denoising_step(made, cache, 0, state, logits)

    def step() -> None:
        state.step.fill_(2)
        state.active.fill_(True)
        denoising_step(made, cache, 0, state, logits)

    work = Work(bytes=30 * experts_hit * EXPERT_BYTES + DENSE_BYTES + 2 * HEAD_BYTES)
    benchmark.extra_info["gigabytes_allocated"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    record(benchmark, step, work, goal, rounds=10)


@pytest.mark.parametrize("peaked", [False, True], ids=["flat", "peaked"])
def bench_head_to_soft_embedding(benchmark: BenchmarkFixture, peaked: bool) -> None:
    """Head, statistics, sampling, acceptance and soft embedding: what a step does after its layers."""
    from dgemma_ext.ops.vocabulary_head import vocabulary_head
    from dgemma_ext.sampler import _advance, _reading

    made = random_model(true_config(layers=1), final_norm=1.0 if peaked else 0.05)
    resolved = dg.SamplerConfig(confidence_threshold=0.0).resolve(made.defaults, 256)
    state = begin_canvas(made, resolved, seed=0, index=0)
    logits = torch.empty(1, 256, made.config.vocab_size, dtype=made.dtype, device=made.device)
    hidden = made.last_hidden(state.canvas, made.new_cache(1, 256), 0, None)

    def step() -> None:
        state.step.fill_(2)
        state.active.fill_(True)
        reading = _reading(made, state)
        raw, statistics = vocabulary_head(hidden, made.weights.embed_tokens, **reading, logits=logits)
        _advance(made, state, raw, reading, statistics, None, None)

    operations = 2.0 * 256 * 262_144 * 2816
    work = Work(bytes=2 * HEAD_BYTES, operations=2 * operations)
    record(benchmark, step, work, 800.0 if peaked else 1350.0)
