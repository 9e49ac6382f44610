"""append_to_cache: rows go to their places in a ring, and a prompt is encoded in chunks through one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from backend import DTYPES, cpu_only
from block_attention_cases import NAN, SENTINEL, Built, Case, Request, Spans, W
from dgemma_ext import _C
from dgemma_ext.ops import block_attention
from dgemma_ext.ops.plain import block_attention as block_attention_plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans", [[], [(50, 58)]])
@pytest.mark.parametrize("chunk", [1, W - 2, W - 1, W, W + 1, 2 * W + 3, 100])
def test_chunked_encode(chunk: int, spans: Spans, dtype: torch.dtype, cpu_variant: str) -> None:
    """Encoding in chunks through a ring gives the same result as one block. A span is inside one chunk."""
    if spans and spans[0][0] // chunk != (spans[0][1] - 1) // chunk:
        spans = []
    total, heads, dim, capacity = 100, 2, 32, W - 1
    whole = Built(Case([Request(0, total, 0, spans)], window=W, capacity=capacity, causal=True), dtype)
    cache_key = torch.full((1, capacity, heads, dim), NAN, dtype=dtype)
    cache_value = cache_key.clone()
    slot = torch.zeros(1, dtype=torch.int32)
    results = []
    for start in range(0, total, chunk):
        query, key, value = (x[:, start : start + chunk].contiguous() for x in (whole.query, whole.key, whole.value))
        place = (cache_key, cache_value, slot, torch.tensor([start], dtype=torch.int32))
        results.append(block_attention.causal_attention(query, key, value, *place, spans=whole.spans, window=W))
        block_attention.append_to_cache(key, value, *place)
    whole.check(torch.cat(results, dim=1))
    whole.check(whole.run())


APPENDS = {
    "empty_cache": Case([Request(0, 10)], capacity=16),
    "wraps": Case([Request(13, 10)], capacity=16),
    "wrapped_often": Case([Request(1000, 16)], capacity=16),
    "longer_than_capacity": Case([Request(5, 70)], capacity=16),
    "much_longer": Case([Request(3, 200)], capacity=130),
    "capacity_one": Case([Request(3, 5)], capacity=1),
    "ragged": Case([Request(5, 9, 2), Request(30, 2, 0), Request(9, 5, -1), Request(7, 0, 1)], capacity=16, block=12),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("append", [block_attention.append_to_cache, block_attention_plain.append_to_cache])
@pytest.mark.parametrize("name", APPENDS)
def test_append(name: str, append: Callable[..., None], dtype: torch.dtype) -> None:
    case = APPENDS[name]
    built = Built(case, dtype)
    wanted_key, wanted_value = built.prefix_key.clone(), built.prefix_value.clone()
    for b, r in enumerate(case.requests):
        for position in range(r.prefix, r.prefix + r.rows if r.slot >= 0 else 0):
            wanted_key[r.slot, position % case.capacity] = built.keys[b][position]
            wanted_value[r.slot, position % case.capacity] = built.values[b][position]
    place = (built.prefix_key, built.prefix_value, built.slot, built.prefix_length)
    append(built.key, built.value, *place, built.length)
    assert torch.equal(built.prefix_key.nan_to_num(SENTINEL), wanted_key.nan_to_num(SENTINEL))
    assert torch.equal(built.prefix_value.nan_to_num(SENTINEL), wanted_value.nan_to_num(SENTINEL))


PARALLEL_FOR = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int64, ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64), ctypes.c_void_p
)


class CpuContext(ctypes.Structure):
    """struct dgemma_cpu."""

    _fields_ = (
        ("parallel_for", PARALLEL_FOR),
        ("pool", ctypes.c_void_p),
        ("variant", ctypes.c_int),
        ("message", ctypes.c_char * 256),
    )


class AppendOperation(ctypes.Structure):
    """struct dgemma_append_to_cache."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "block_length", "key_heads", "head_dim", "slots", "capacity")),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("key", "value", "prefix_key", "prefix_value")),
        *((name, ctypes.c_void_p) for name in ("slot", "prefix_length", "length")),
    )


@cpu_only
@pytest.mark.parametrize("backwards", [False, True])
def test_append_in_any_order_of_tasks(backwards: bool) -> None:
    """A host may run the tasks of a call in any order, so no two may write the same row."""

    @PARALLEL_FOR
    def parallel_for(pool: Any, tasks: int, task: Any, state: Any) -> None:
        for i in reversed(range(tasks)) if backwards else range(tasks):
            task(state, i)

    case = Case([Request(3, 200)], capacity=70)
    built = Built(case, torch.float32)
    tensors = (built.key, built.value, built.prefix_key, built.prefix_value, built.slot, built.prefix_length)
    pointers = [tensor.data_ptr() for tensor in tensors]
    operation = AppendOperation(1, 200, case.key_heads, case.head_dim, 1, 70, 0, *pointers, None)
    context = CpuContext(parallel_for, None, -1, b"")
    library = ctypes.CDLL(_C.__file__)
    assert library.dgemma_cpu_append_to_cache(ctypes.byref(operation), ctypes.byref(context)) == 0, context.message
    for position in range(203 - 70, 203):
        assert torch.equal(built.prefix_key[0, position % 70], built.keys[0][position])
        assert torch.equal(built.prefix_value[0, position % 70], built.values[0][position])
