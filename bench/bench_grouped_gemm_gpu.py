"""moe_ffn on a GPU at the model's sizes, beside torch's grouped product in the same run.

    make gpu-check ARGS="--part bench -k moe"

Routing decides how many experts' weights are read: drawn uniformly, 256 tokens hit all 128; real text hits about 84,
which a draw from 84 experts gives. Weights of one layer are 1.5 GB, so no cache holds them from one round to the next.
Goals are for one H200.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from gpu_clock import Work, record
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dgemma_ext.ops import grouped_gemm

HIDDEN_SIZE, EXPERT_SIZE, EXPERTS, TOP_K = 2816, 704, 128, 8
VALUES = 3 * HIDDEN_SIZE * EXPERT_SIZE  # weights of one expert

# tokens, experts that routing draws from, goal in microseconds
SIZES = [(1, 128, None), (16, 128, None), (256, 84, None), (256, 128, 370.0), (1024, 128, 420.0), (2048, 128, 540.0)]
SIZES += [(4096, 128, 800.0), (16384, 128, None)]

pytestmark = pytest.mark.gpu


@cache
def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    gate_up = torch.randn(EXPERTS, 2 * EXPERT_SIZE, HIDDEN_SIZE, **shape).mul_(HIDDEN_SIZE**-0.5)
    return gate_up, torch.randn(EXPERTS, HIDDEN_SIZE, EXPERT_SIZE, **shape).mul_(EXPERT_SIZE**-0.5)


def grouped_products(input: Tensor, ids: Tensor, scales: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same by torch's grouped product: sort the pairs, gather, two products, scatter."""
    order = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten(), minlength=EXPERTS).cumsum(0).int()
    rows = input[order // TOP_K]
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    products = F.grouped_mm(F.gelu(gate, approximate="tanh") * up, down.transpose(1, 2), offs=ends)
    back = torch.empty_like(products).index_copy_(0, order, products)
    return (back.view(-1, TOP_K, HIDDEN_SIZE).float() * scales[..., None]).sum(1).to(input.dtype)


@pytest.mark.parametrize(("tokens", "drawn", "goal"), SIZES, ids=[f"{t}_tokens_{d}_experts" for t, d, _ in SIZES])
def bench_moe_ffn(benchmark: BenchmarkFixture, tokens: int, drawn: int, goal: float | None) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    input = torch.randn(tokens, HIDDEN_SIZE, device="cuda", generator=generator).bfloat16()
    ids = torch.rand(tokens, drawn, device="cuda", generator=generator).argsort(dim=1)[:, :TOP_K].int().contiguous()
    scales = torch.rand(tokens, TOP_K, device="cuda", generator=generator) / TOP_K
    arguments = (input, ids, scales, *weights())
    out = torch.empty_like(input)
    workspace = torch.empty(grouped_gemm.moe_ffn_workspace(*arguments), dtype=torch.uint8, device="cuda")

    ours = grouped_gemm.moe_ffn(*arguments, out=out, workspace=workspace).float()
    theirs = grouped_products(*arguments).float()
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02, "the peer computes something else"

    hit = int(torch.unique(ids).numel())
    work = Work(bytes=2.0 * (hit * VALUES + 2 * tokens * HIDDEN_SIZE), operations=2.0 * tokens * TOP_K * VALUES)
    benchmark.extra_info["experts_hit"] = hit
    record(
        benchmark,
        lambda: grouped_gemm.moe_ffn(*arguments, out=out, workspace=workspace),
        work,
        goal,
        lambda: grouped_products(*arguments),
    )
