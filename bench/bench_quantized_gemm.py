"""moe_ffn over quantized weights on the CPU at the model's width, beside bfloat16 in the same run.

    make bench, or:  pytest -q -o python_files='bench_*.py' bench/bench_quantized_gemm.py
    DGEMMA_BENCH=small divides the number of experts by eight (190 MB of bfloat16 weights in place of 1.5 GB)

`ratio` is a format's time over bfloat16's, the best of rounds that take turns; with one thread CPU time, with two the
wall's. `memory` is its bytes over bfloat16's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dgemma_ext import _C
from dgemma_ext.checkpoint import parse_target, stack_weights
from dgemma_ext.ops.formats import QuantizedWeight
from dgemma_ext.ops.weights import experts

HIDDEN_SIZE, EXPERT_SIZE, TOP_K = 2816, 704, 8
EXPERTS = 16 if os.environ.get("DGEMMA_BENCH") == "small" else 128
ROUNDS = 7
Weights = tuple[Tensor | QuantizedWeight, Tensor | QuantizedWeight]


@pytest.fixture(scope="module")
def plain() -> tuple[Tensor, Tensor]:
    """gate_up and down of one layer. All experts are copies of one, because only the number of bytes matters."""
    gate_up = torch.randn(2 * EXPERT_SIZE, HIDDEN_SIZE).mul_(HIDDEN_SIZE**-0.5).bfloat16()
    down = torch.randn(HIDDEN_SIZE, EXPERT_SIZE).mul_(EXPERT_SIZE**-0.5).bfloat16()
    return gate_up.expand(EXPERTS, -1, -1).contiguous(), down.expand(EXPERTS, -1, -1).contiguous()


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def quantized(format: str, plain: tuple[Tensor, Tensor]) -> tuple[QuantizedWeight, QuantizedWeight]:
    """Both weights in a format; the first expert's codes are copied to all."""
    target = parse_target(format)
    gate_up = stack_weights([[q.weight for q in target.quantize(list(plain[0][0].chunk(2)))]], 1)
    down = stack_weights([[q.weight for q in target.quantize([plain[1][0]])]], 1)

    def of_all(weight: QuantizedWeight) -> QuantizedWeight:
        copies = {name: part.expand(EXPERTS, *part.shape[1:]).contiguous() for name, part in weight.tensors().items()}
        return replace(weight, **copies)

    return of_all(gate_up), of_all(down)


@pytest.mark.parametrize("tokens", [256, 1])
@pytest.mark.parametrize("format", ["fp8", "int4", "int4-64", "nvfp4"])
def bench_quantized_moe_ffn(
    benchmark: BenchmarkFixture, plain: tuple[Tensor, Tensor], threads: int, format: str, tokens: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(tokens, HIDDEN_SIZE, generator=generator).bfloat16()
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K].int().contiguous()
    scales = torch.rand(tokens, TOP_K, generator=generator) / TOP_K
    made = quantized(format, plain)
    clock: Callable[[], float] = time.thread_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {"bfloat16": [], format: []}

    def timed(who: str, weights: Weights) -> None:
        begin = clock()
        experts(input, ids, scales, *weights)
        seconds[who].append(clock() - begin)

    benchmark.pedantic(
        lambda: timed(format, made), setup=lambda: timed("bfloat16", plain), rounds=ROUNDS, warmup_rounds=1
    )
    ours, theirs = min(seconds[format]), min(seconds["bfloat16"])
    benchmark.extra_info.update(
        variant=_C.cpu_variant(),
        peer="ours in bfloat16",
        ours_ms=round(1e3 * ours, 1),
        peer_ms=round(1e3 * theirs, 1),
        ratio=round(ours / theirs, 3),
        memory=round(sum(weight.nbytes for weight in made) / sum(weight.nbytes for weight in plain), 3),
    )
    print(f"\n{threads} threads, {tokens} tokens, {format}: {benchmark.extra_info}")
