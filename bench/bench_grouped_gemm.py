"""moe_ffn on the CPU at the model's width, beside torch in the same run.

    make bench, or:  pytest -q -o python_files='bench_*.py' bench/bench_grouped_gemm.py
    DGEMMA_BENCH=small divides the number of experts by eight (190 MB of weights in place of 1.5 GB)

A time means little on a shared machine; `ratio` is ours over the peer's, both the best of rounds that take turns. With
one thread both are the thread's CPU time, which other processes do not lengthen by taking the core; with two they are
the wall's. GB/s counts each weight of the experts that are hit once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dgemma_ext import _C
from dgemma_ext.ops import grouped_gemm

HIDDEN_SIZE, EXPERT_SIZE, TOP_K = 2816, 704, 8
EXPERTS = 16 if os.environ.get("DGEMMA_BENCH") == "small" else 128
ROUNDS = 5
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def weights() -> tuple[Tensor, Tensor]:
    """gate_up and down of one layer. All experts are copies of one, because only the number of bytes matters."""
    gate_up = torch.randn(2 * EXPERT_SIZE, HIDDEN_SIZE, dtype=torch.float32).mul_(HIDDEN_SIZE**-0.5).bfloat16()
    down = torch.randn(HIDDEN_SIZE, EXPERT_SIZE, dtype=torch.float32).mul_(EXPERT_SIZE**-0.5).bfloat16()
    return gate_up.expand(EXPERTS, -1, -1).contiguous(), down.expand(EXPERTS, -1, -1).contiguous()


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def loop_over_experts(
    input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """A loop as one would write it by hand: torch's product for every expert that is hit."""
    result = torch.zeros_like(input, dtype=torch.float32)
    for expert in torch.unique(expert_ids).tolist():
        token, slot = torch.where(expert_ids == expert)
        gate, up = F.linear(input[token], gate_up[expert]).split(EXPERT_SIZE, dim=-1)
        y = F.linear(F.gelu(gate, approximate="tanh") * up, down[expert])
        result.index_add_(0, token, y * expert_weights[token, slot, None])
    return result.to(input.dtype)


def transformers_experts(implementation: str) -> Callable[..., Tensor]:
    """The experts of transformers' own model with `experts_implementation=implementation`."""
    from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaTextConfig
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextExperts

    config: Any = DiffusionGemmaTextConfig(
        hidden_size=HIDDEN_SIZE, moe_intermediate_size=EXPERT_SIZE, num_experts=EXPERTS, top_k_experts=TOP_K
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = DiffusionGemmaTextExperts(config)

    def run(input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        if module.gate_up_proj.is_meta:
            module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
            module.down_proj = torch.nn.Parameter(down, requires_grad=False)
        result: Tensor = module(input, expert_ids.long(), expert_weights)
        return result

    return run


PEERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "loop over experts": lambda: loop_over_experts,
    "transformers eager": lambda: transformers_experts("eager"),
    "transformers grouped_mm": lambda: transformers_experts("grouped_mm"),
}


def make_arguments(tokens: int, weights: tuple[Tensor, Tensor]) -> Arguments:
    """Uniform routing: at 256 tokens and 128 experts all are hit, by 16 tokens on average."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(tokens, HIDDEN_SIZE, generator=generator).bfloat16()
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K].int().contiguous()
    return input, ids, torch.rand(tokens, TOP_K, generator=generator) / TOP_K, *weights


@pytest.mark.parametrize("tokens", [256, 1])
@pytest.mark.parametrize("peer", PEERS, ids=[f"ours beside {peer}" for peer in PEERS])
def bench_moe_ffn(
    benchmark: BenchmarkFixture, weights: tuple[Tensor, Tensor], threads: int, peer: str, tokens: int
) -> None:
    arguments = make_arguments(tokens, weights)
    run_peer = PEERS[peer]()
    out = torch.empty_like(arguments[0])
    workspace = torch.empty(grouped_gemm.moe_ffn_workspace(*arguments), dtype=torch.uint8)
    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}

    def timed(who: str, run: Callable[[], object]) -> None:
        begin = clock()
        run()
        seconds[who].append(clock() - begin)

    def run_ours() -> None:
        timed("ours", lambda: grouped_gemm.moe_ffn(*arguments, out=out, workspace=workspace))

    def setup() -> None:
        timed("peer", lambda: run_peer(*arguments))

    expected = run_peer(*arguments).float()
    ours = grouped_gemm.moe_ffn(*arguments, out=out, workspace=workspace).float()
    assert float((ours - expected).norm() / expected.norm()) < 0.02, "the peer computes something else"
    with torch.inference_mode():
        benchmark.pedantic(run_ours, setup=setup, rounds=ROUNDS, warmup_rounds=1)

    best, peer_best = min(seconds["ours"]), min(seconds["peer"])
    hit = int(torch.unique(arguments[1]).numel())
    values = 3 * HIDDEN_SIZE * EXPERT_SIZE
    benchmark.extra_info.update(
        variant=_C.cpu_variant(),
        peer=peer,
        ours_ms=round(1e3 * best, 1),
        peer_ms=round(1e3 * peer_best, 1),
        ratio=round(best / peer_best, 3),
        gigabytes_per_second=round(hit * values * 2 / best / 1e9, 1),
        gigaflops=round(2 * tokens * TOP_K * values / best / 1e9, 1),
    )
    print(f"\n{threads} threads, {tokens} tokens, beside {peer}: {benchmark.extra_info}")
