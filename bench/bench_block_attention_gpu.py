"""Canvas attention on a GPU at the model's sizes, beside torch's scaled_dot_product_attention in the same run.

    make gpu-check ARGS="--part bench -k attention"

torch gets its keys and values gathered into one tensor, and as many heads as there are queries. Goals, for one H200:
25 sliding layers and 5 full ones in 750 µs at a prefix of 4,096 and 1,100 µs at 8,192.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_clock import Work, record
from pytest_benchmark.fixture import BenchmarkFixture

from dgemma_ext.ops import block_attention

ROWS, QUERY_HEADS = 256, 16
SLIDING: dict[str, Any] = {"key_heads": 8, "head_dim": 256, "window": 1024}
FULL: dict[str, Any] = {"key_heads": 2, "head_dim": 512, "window": 0}
LAYERS = {
    "sliding_1023": (SLIDING, 1023),
    "full_128": (FULL, 128),
    "full_4096": (FULL, 4096),
    "full_8192": (FULL, 8192),
    "full_65536": (FULL, 65536),
}

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layer", LAYERS)
def bench_canvas_attention(benchmark: BenchmarkFixture, layer: str) -> None:
    sizes, prefix = LAYERS[layer]
    key_heads, head_dim, window = sizes["key_heads"], sizes["head_dim"], sizes["window"]
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    query = normal(1, ROWS, QUERY_HEADS, head_dim) * (2.0 / head_dim**0.5)
    key, value = normal(1, ROWS, key_heads, head_dim), normal(1, ROWS, key_heads, head_dim)
    stored = (normal(1, prefix, key_heads, head_dim), normal(1, prefix, key_heads, head_dim))
    slot = torch.zeros(1, dtype=torch.int32, device="cuda")
    length = torch.full((1,), prefix, dtype=torch.int32, device="cuda")
    out, workspace = torch.empty_like(query), block_attention.attention_workspace(query, key)
    whole = [torch.cat((before, now), dim=1).transpose(1, 2) for before, now in zip(stored, (key, value), strict=True)]
    group = QUERY_HEADS // key_heads
    keys, values = (x.repeat_interleave(group, dim=1).contiguous() for x in whole)
    queries = query.transpose(1, 2).contiguous()

    def ours() -> torch.Tensor:
        return block_attention.canvas_attention(
            query, key, value, *stored, slot, length, None, window, 1.0, out=out, workspace=workspace
        )

    def theirs() -> torch.Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, scale=1.0)

    difference = (ours().transpose(1, 2).float() - theirs().float()).norm() / theirs().float().norm()
    assert float(difference) < 0.02, "the peer computes something else"
    record(benchmark, ours, work_of(layer), None, theirs)


def work_of(layer: str) -> Work:
    """The least that a canvas moves and multiplies."""
    sizes, prefix = LAYERS[layer]
    key_heads, head_dim = sizes["key_heads"], sizes["head_dim"]
    positions = prefix + ROWS
    return Work(
        bytes=2.0 * head_dim * (2 * ROWS * QUERY_HEADS + 2 * positions * key_heads),
        operations=4.0 * ROWS * QUERY_HEADS * positions * head_dim,
    )


PAGE_SIZE = 16  # vLLM's smallest on a GPU


@pytest.mark.parametrize("layer", LAYERS)
def bench_paged_attention(benchmark: BenchmarkFixture, layer: str) -> None:
    """The same over pages in no order, keys beside values, beside the contiguous form."""
    sizes, prefix = LAYERS[layer]
    key_heads, head_dim, window = sizes["key_heads"], sizes["head_dim"], sizes["window"]
    generator, total = torch.Generator("cuda").manual_seed(0), prefix + ROWS

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    query = normal(ROWS, QUERY_HEADS, head_dim) * (2.0 / head_dim**0.5)
    keys, values = normal(total, key_heads, head_dim), normal(total, key_heads, head_dim)
    pages = -(-total // PAGE_SIZE)
    pool = torch.zeros(pages, PAGE_SIZE, key_heads, 2 * head_dim, device="cuda", dtype=torch.bfloat16)
    key_pages, value_pages = pool.split(head_dim, dim=-1)
    page_table = torch.randperm(pages, device="cuda", generator=generator).int()[None]
    position = torch.arange(total, device="cuda")
    slot = page_table[0, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
    block_attention.append_to_pages(keys, values, key_pages, value_pages, slot)
    requests, out = (ints(0, ROWS), ints(total), ints(0)), torch.empty_like(query)
    bytes_wanted = block_attention.paged_attention_workspace_bytes(
        1, ROWS, QUERY_HEADS, key_heads, head_dim, query.device
    )
    workspace = torch.empty(bytes_wanted, dtype=torch.uint8, device="cuda")
    stored = [x[None, :prefix].contiguous() for x in (keys, values)]
    block = [x[None, prefix:].contiguous() for x in (keys, values)]
    place = (ints(0), ints(prefix))

    def ours() -> torch.Tensor:
        return block_attention.paged_attention(
            *(query, key_pages, value_pages, page_table, *requests),
            **{"max_query_length": ROWS, "window": window, "out": out, "workspace": workspace},
        )

    def contiguous() -> torch.Tensor:
        return block_attention.canvas_attention(query[None], *block, *stored, *place, None, window, 1.0)

    assert torch.equal(ours(), contiguous()[0])
    record(benchmark, ours, work_of(layer), None, contiguous)
