"""Block attention at the model's sizes, beside torch's scaled_dot_product_attention in the same run.

    python -m pytest -q -o python_files='bench_*.py' bench/bench_block_attention.py [-k sliding]

extra_info: GFLOP/s (4 x rows x visible keys x query heads x head dim), the floor in bytes as GB/s (queries, output and
every visible key and value once), and `ratio`, this kernel's time over torch's, the median of pairs run by turns. A
time means little on a shared machine; the ratio is what counts. torch gets its keys and values already gathered into
one tensor, which a cache with a ring would have to do first.

`test_paged_attention` is the same call over pages, beside the contiguous form by turns; its ratio is of processor time.

DGEMMA_CPU chooses the variant, DGEMMA_BENCH_THREADS the threads (default: torch's).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dgemma_ext import _C
from dgemma_ext.ops import block_attention

PAIRS = 5


@dataclass
class Layer:
    """One layer's attention; prefix positions and rows of the block."""

    query_heads: int
    key_heads: int
    head_dim: int
    window: int
    prefix: int
    rows: int = 256
    causal: bool = False

    @property
    def stored(self) -> int:
        return min(self.prefix, self.window - 1) if self.window else self.prefix


SLIDING = {"query_heads": 16, "key_heads": 8, "head_dim": 256, "window": 1024}
FULL = {"query_heads": 16, "key_heads": 2, "head_dim": 512, "window": 0}
LAYERS = {
    "sliding_128": Layer(**SLIDING, prefix=128),
    "sliding_1023": Layer(**SLIDING, prefix=1023),
    "full_128": Layer(**FULL, prefix=128),
    "full_2048": Layer(**FULL, prefix=2048),
    "full_8192": Layer(**FULL, prefix=8192),
    "small": Layer(query_heads=4, key_heads=2, head_dim=32, window=128, prefix=100, rows=32),
    "encode_sliding": Layer(**SLIDING, prefix=1023, rows=1024, causal=True),
    "encode_full": Layer(**FULL, prefix=0, rows=1024, causal=True),
}


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", LAYERS)
def test_attention(name: str, dtype: torch.dtype, benchmark: Any) -> None:
    layer = LAYERS[name]
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("DGEMMA_BENCH_THREADS", torch.get_num_threads())))
    rows, heads, dim, stored = layer.rows, layer.key_heads, layer.head_dim, layer.stored
    query = (torch.randn(1, rows, layer.query_heads, dim) * 2 / dim**0.5).to(dtype)
    key, value = (torch.randn(1, rows, heads, dim).to(dtype) for _ in range(2))
    prefix_key, prefix_value = (torch.randn(1, max(1, stored), heads, dim).to(dtype) for _ in range(2))
    slot, prefix_length = torch.zeros(1, dtype=torch.int32), torch.tensor([layer.prefix], dtype=torch.int32)
    out, workspace = torch.empty_like(query), block_attention.attention_workspace(query, key)
    function = block_attention.causal_attention if layer.causal else block_attention.canvas_attention
    operands = (query, key, value, prefix_key, prefix_value, slot, prefix_length)

    def ours() -> None:
        function(*operands, window=layer.window, out=out, workspace=workspace)

    all_keys = torch.cat([prefix_key[:, :stored], key], dim=1).transpose(1, 2)
    all_values = torch.cat([prefix_value[:, :stored], value], dim=1).transpose(1, 2)
    mask = torch.ones(rows, stored + rows, dtype=torch.bool)
    if layer.causal:
        mask = mask.tril(stored)
        if layer.window:
            mask = mask.triu(stored - layer.window + 1)
    pairs = int(mask.sum())
    given_mask = mask if layer.causal else None

    def theirs() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), all_keys, all_values, attn_mask=given_mask, scale=1.0, enable_gqa=True
        )

    ours()
    difference = (out.float() - theirs().transpose(1, 2).float()).norm() / out.float().norm()
    assert float(difference) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    pairs_of_seconds = [(seconds(ours), seconds(theirs)) for _ in range(PAIRS)]
    benchmark.pedantic(ours, rounds=PAIRS, warmup_rounds=1)
    best = benchmark.stats.stats.min
    moved = sum(x.nbytes for x in (query, out, all_keys, all_values))
    benchmark.extra_info.update(
        variant=_C.cpu_variant(),
        threads=torch.get_num_threads(),
        gflops=round(4 * pairs * layer.query_heads * dim / best / 1e9, 1),
        gbytes=round(moved / best / 1e9, 1),
        peer="torch",
        ours_ms=round(1e3 * statistics.median(mine for mine, _ in pairs_of_seconds), 3),
        peer_ms=round(1e3 * statistics.median(its for _, its in pairs_of_seconds), 3),
        ratio=round(statistics.median(mine / its for mine, its in pairs_of_seconds), 3),
    )
    print(f"\n{name} {dtype}: {benchmark.extra_info}")


PAGE_SIZE = 128  # vLLM's on a CPU


def processor_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", ["sliding_1023", "full_2048", "small", "encode_sliding"])
def test_paged_attention(name: str, dtype: torch.dtype, benchmark: Any) -> None:
    """Keys beside values in each page, as vLLM has them, and the pages in no order."""
    layer = LAYERS[name]
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("DGEMMA_BENCH_THREADS", torch.get_num_threads())))
    rows, heads, dim, total = layer.rows, layer.key_heads, layer.head_dim, layer.prefix + layer.rows
    query = (torch.randn(rows, layer.query_heads, dim) * 2 / dim**0.5).to(dtype)
    keys, values = (torch.randn(total, heads, dim).to(dtype) for _ in range(2))
    pages = -(-total // PAGE_SIZE)
    pool = torch.zeros(pages, heads, PAGE_SIZE, 2 * dim, dtype=dtype).transpose(1, 2)
    key_pages, value_pages = pool.split(dim, dim=-1)
    page_table = torch.randperm(pages).int()[None]
    position = torch.arange(total)
    slot = page_table[0, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
    block_attention.append_to_pages(keys, values, key_pages, value_pages, slot)
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([0, rows], [total], [int(layer.causal)])]
    sizes = (1, rows, layer.query_heads, heads, dim, "cpu")
    out = torch.empty_like(query)
    workspace = torch.empty(block_attention.paged_attention_workspace_bytes(*sizes), dtype=torch.uint8)
    operands = (query, key_pages, value_pages, page_table, *ints)
    numbers = {"max_query_length": rows, "window": layer.window}

    def ours() -> None:
        block_attention.paged_attention(*operands, **numbers, out=out, workspace=workspace)

    function = block_attention.causal_attention if layer.causal else block_attention.canvas_attention
    prefix = [x[None, : max(1, layer.prefix)].contiguous() for x in (keys, values)]
    block = [x[None, layer.prefix :].contiguous() for x in (keys, values)]
    place = (torch.zeros(1, dtype=torch.int32), torch.tensor([layer.prefix], dtype=torch.int32))

    other = torch.empty_like(query)[None]

    def contiguous() -> None:
        function(query[None], *block, *prefix, *place, window=layer.window, out=other, workspace=workspace)

    ours()
    contiguous()
    assert torch.equal(out, other[0])
    pairs = [(processor_seconds(ours), processor_seconds(contiguous)) for _ in range(2 * PAIRS)]
    benchmark.pedantic(ours, rounds=PAIRS, warmup_rounds=1)
    benchmark.extra_info.update(
        variant=_C.cpu_variant(),
        threads=torch.get_num_threads(),
        peer="the contiguous form",
        ours_ms=round(1e3 * statistics.median(mine for mine, _ in pairs), 3),
        peer_ms=round(1e3 * statistics.median(its for _, its in pairs), 3),
        ratio=round(statistics.median(mine / its for mine, its in pairs), 3),
    )
    print(f"\n{name} {dtype}: {benchmark.extra_info}")
