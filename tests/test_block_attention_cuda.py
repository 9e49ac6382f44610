"""The CUDA kernels of attention by their C interface: run on the host by the test bed, their plan walked."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sim.build import ROOT, SUPPORTED, sim_library
from test_block_attention import Built, Case, Request

FAMILY = ROOT / "csrc" / "block_attention"
KERNELS = ["sm80_bf16_attention", "sm90_bf16_attention_256", "sm90_bf16_attention_512", "combine_splits"]
KERNELS += ["append_to_cache"]
SOURCES = [FAMILY / f"{name}.cu" for name in [*KERNELS, "cuda"] if (FAMILY / f"{name}.cu").exists()]
SOURCES += [ROOT / "csrc" / "cuda" / "entry.cu", FAMILY / "plan_cuda.cpp"]
SOURCES += [ROOT / "tests" / "sim" / "kernels" / "attention_plan.cpp"]
# Orders in which the machine runs threads and lets copies and products land.
SEEDS = [1, 2, 3]
GUARD = 256  # bytes behind the workspace
HEAD_DIMS = [256, 512]

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")


class BlockAttention(ctypes.Structure):
    """dgemma_block_attention of csrc/include/dgemma/block_attention.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "block_length", "query_heads", "key_heads", "head_dim")]
        + [(name, ctypes.c_int64) for name in ("slots", "capacity", "window")]
        + [("scale", ctypes.c_float), ("dtype", ctypes.c_int)]
        + [(name, ctypes.c_void_p) for name in ("query", "key", "value", "prefix_key", "prefix_value")]
        + [(name, ctypes.c_void_p) for name in ("slot", "prefix_length", "length", "spans")]
        + [("spans_per_request", ctypes.c_int64), ("output", ctypes.c_void_p)]
        + [("workspace", ctypes.c_void_p), ("workspace_bytes", ctypes.c_size_t)]
    )


class Cuda(ctypes.Structure):
    """dgemma_cuda of csrc/include/dgemma/base.h."""

    _fields_ = [("stream", ctypes.c_void_p), ("message", ctypes.c_char * 256)]


BFLOAT16 = 1
OK = 0


@cache
def library() -> ctypes.CDLL:
    built = sim_library("block_attention", SOURCES, ["-DDGEMMA_WITH_SM90"])
    built.dgemma_cuda_block_attention_workspace.restype = ctypes.c_size_t
    built.attention_plan.restype = ctypes.c_char_p
    return built


def describe(built: Built) -> BlockAttention:
    """Without output and workspace."""
    case = built.case
    batch, block, query_heads, head_dim = built.query.shape
    slots, capacity, key_heads, _ = built.prefix_key.shape
    op = BlockAttention(batch, block, query_heads, key_heads, head_dim, slots, capacity, case.window)
    op.scale, op.dtype = case.scale, BFLOAT16
    for name in ("query", "key", "value", "prefix_key", "prefix_value", "slot", "prefix_length", "length"):
        setattr(op, name, getattr(built, name).data_ptr())
    if case.causal and built.spans is not None:
        op.spans, op.spans_per_request = built.spans.data_ptr(), built.spans.shape[1]
    return op


@contextmanager
def gpu(capability: int) -> Iterator[None]:
    """The GPU that the test bed plays."""
    library().sim_set_gpu(capability, 3)
    try:
        yield
    finally:
        library().sim_set_gpu(90, 3)


def run(built: Built, seed: int, capability: int = 90, with_length: bool = True) -> Tensor:
    """The output of a call into poison, in one of the machine's orders; rows that have no query stay NaN."""
    op = describe(built)
    if not with_length:
        op.length = None
    out = torch.full_like(built.query, float("nan"))
    op.workspace_bytes = library().dgemma_cuda_block_attention_workspace(ctypes.byref(op))
    workspace = torch.full((op.workspace_bytes + GUARD,), 0xFF, dtype=torch.uint8)
    op.output, op.workspace = out.data_ptr(), workspace.data_ptr()
    function = library().dgemma_cuda_causal_attention if built.case.causal else library().dgemma_cuda_canvas_attention
    library().sim_set_seed(ctypes.c_uint64(seed))
    cuda = Cuda()
    with gpu(capability):
        status = function(ctypes.byref(op), ctypes.byref(cuda))
    assert status == OK, cuda.message.decode()
    assert bool((workspace[op.workspace_bytes :] == 0xFF).all()), "written behind the workspace"
    return out


def build(case: Case) -> Built:
    built = Built(case, torch.bfloat16)
    built.poison_unseen()
    return built


def check(built: Built, out: Tensor) -> None:
    """Against the oracle; rows without a query are as they were."""
    for b, request in enumerate(built.case.requests):
        assert bool(out[b, request.rows if request.slot >= 0 else 0 :].isnan().all())
    built.check(out.nan_to_num(0.0) if bool(out.isnan().any()) and finite_rows(built, out) else out)


def finite_rows(built: Built, out: Tensor) -> bool:
    """Whether all rows that have a query are finite."""
    return all(
        bool(torch.isfinite(out[b, : request.rows]).all())
        for b, request in enumerate(built.case.requests)
        if request.slot >= 0
    )


SLIDING: dict[str, Any] = {"query_heads": 2, "key_heads": 1, "window": 200, "capacity": 199}
# Tiles of keys: 80 at head dimension 256, 64 at 512. Tiles of rows: 128 and 64.
CASES = {
    # One row; the second block of the cluster has none.
    "one_row": Case([Request(3, 1)], query_heads=1, key_heads=1, capacity=5),
    "no_prefix": Case([Request(0, 70)], query_heads=2, key_heads=1, capacity=0),
    # Whole tiles of the prefix and of the block, and nothing else.
    "whole_tiles": Case([Request(320, 160)], query_heads=1, key_heads=1, capacity=640),
    # The ring's end within a tile, the prefix's end within another, a tail.
    "ring": Case([Request(1000, 90)], **SLIDING),
    "window_above_prefix": Case([Request(150, 65)], **SLIDING),
    "capacity_above_window": Case([Request(777, 40)], query_heads=2, key_heads=2, window=150, capacity=400),
    # Three tiles of rows at 256: the last cluster has one.
    "odd_row_tiles": Case([Request(100, 150)], query_heads=2, key_heads=1, capacity=128),
    "group_8": Case([Request(130, 40)], query_heads=8, key_heads=1, capacity=200),
    "heads": Case([Request(90, 20)], query_heads=6, key_heads=3, capacity=90, scale=0.25),
    "negative_scale": Case([Request(90, 20)], query_heads=1, key_heads=1, capacity=90, scale=-0.5),
    # Three splits, each with a number of tiles of its own, and of some with none.
    "split": Case([Request(800, 33)], query_heads=2, key_heads=1, capacity=801),
    "ragged": Case(
        [Request(300, 7, 2), Request(600, 33, 0), Request(9, 5, -1), Request(0, 1, 3), Request(31, 0, 1)],
        query_heads=4,
        key_heads=2,
        window=260,
        capacity=259,
        block=40,
    ),
}
CAUSAL_CASES = {
    "no_prefix": Case([Request(0, 130)], query_heads=2, key_heads=1, capacity=1),
    "window": Case([Request(500, 150)], query_heads=2, key_heads=1, window=90, capacity=89),
    "split": Case([Request(700, 70)], query_heads=2, key_heads=1, capacity=700),
    "spans": Case(
        [Request(210, 90, 0, [(150, 260), (262, 290)]), Request(40, 30, 1, [(44, 44), (45, 90)])],
        query_heads=2,
        key_heads=1,
        window=60,
        capacity=70,
    ),
}
for causal_case in CAUSAL_CASES.values():
    causal_case.causal = True
ALL_CASES = {**CASES, **{f"causal_{name}": case for name, case in CAUSAL_CASES.items()}}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", ALL_CASES)
def test_kernels_are_right(name: str, head_dim: int) -> None:
    case = ALL_CASES[name]
    case.head_dim = head_dim
    built = build(case)
    outputs = [run(built, seed) for seed in SEEDS]
    check(built, outputs[0])
    for output in outputs[1:]:
        assert torch.equal(output.view(torch.int16), outputs[0].view(torch.int16))
