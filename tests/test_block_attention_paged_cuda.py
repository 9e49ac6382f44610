"""The CUDA kernels of attention over pages by their C interface, run on the host by the test bed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from block_attention_cases import Case, Request
from block_attention_pages import Paged
from c_interface import ROOT, context, operation
from sim.build import SUPPORTED, sim_library
from sparse_memory import sparse

FAMILY = ROOT / "csrc" / "block_attention"
SOURCES = [*sorted(FAMILY.rglob("*.cu")), FAMILY / "cuda" / "plan.cpp", ROOT / "csrc" / "cuda" / "entry.cu"]
# Orders in which the machine runs threads and lets copies and products land.
SEEDS = [1, 2, 3]
GUARD = 128  # elements before and behind the output

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")


@cache
def library() -> ctypes.CDLL:
    built = sim_library("paged_attention", SOURCES)
    built.sim_set_stream.restype = ctypes.c_void_p
    for name in ("paged", "block"):
        getattr(built, f"dgemma_cuda_{name}_attention_workspace").restype = ctypes.c_size_t
    return built


@contextmanager
def gpu(capability: int, blocks: int, seed: int) -> Iterator[None]:
    """The GPU that the test bed plays, in one of its orders; no kernel is in front of the first."""
    library().sim_set_seed(ctypes.c_uint64(seed))
    library().sim_set_gpu(capability, blocks)
    try:
        yield
    finally:
        library().sim_set_gpu(90, 3)


def call(struct: str, function: str, values: dict[str, Any]) -> Tensor:
    """The output of a call into poison: what nobody wrote is NaN."""
    query = values["query"]
    guarded = torch.full((query.numel() + 2 * GUARD,), -1, dtype=torch.int16)
    op = operation(struct, {**values, "output": guarded.data_ptr() + 2 * GUARD})
    op.workspace_bytes = getattr(library(), f"dgemma_cuda_{struct}_workspace")(ctypes.byref(op))
    workspace = torch.full((op.workspace_bytes + 256,), 0xFF, dtype=torch.uint8)
    op.workspace = workspace.data_ptr() + -workspace.data_ptr() % 64
    cuda = context(where="cuda")
    cuda.stream = library().sim_set_stream(ctypes.c_void_p(1))
    status = getattr(library(), f"dgemma_cuda_{function}")(ctypes.byref(op), ctypes.byref(cuda))
    assert status == 0, cuda.message.decode()
    assert bool((workspace[op.workspace_bytes + 64 :] == 0xFF).all()), "written behind the workspace"
    assert bool((guarded[:GUARD] == -1).all()), "written before the output"
    assert bool((guarded[-GUARD:] == -1).all()), "written behind the output"
    return guarded[GUARD:-GUARD].view(torch.bfloat16).reshape(query.shape)


def run(struct: str, function: str, values: dict[str, Any], seed: int, capability: int, blocks: int) -> Tensor:
    with gpu(capability, blocks, seed):
        return call(struct, function, values)


def of_pages(paged: Paged, **others: Any) -> dict[str, Any]:
    values = {**paged.arguments(), "dtype": torch.bfloat16, **others}
    tokens, query_heads, head_dim = values["query"].shape
    pages, page_size, key_heads, _ = values["key_pages"].shape
    values |= {"tokens": tokens, "query_heads": query_heads, "head_dim": head_dim, "key_heads": key_heads}
    values |= {"pages": pages, "page_size": page_size}
    values["requests"], values["pages_per_request"] = values["page_table"].shape
    for which in ("key", "value"):
        pool = values[f"{which}_pages"]
        values[f"{which}_pages"] = pool.data_ptr()
        for name, stride in zip(("page", "row", "head"), pool.stride(), strict=False):
            values[f"{which}_{name}_stride"] = stride
    if values["spans"] is not None:
        values["spans_per_request"] = values["spans"].shape[1]
    return values


def of_slots(paged: Paged, b: int) -> dict[str, Any]:
    built = paged.form(b)
    batch, block, query_heads, head_dim = built.query.shape
    slots, capacity, key_heads, _ = built.prefix_key.shape
    sizes = {"batch": batch, "block_length": block, "query_heads": query_heads, "key_heads": key_heads}
    sizes |= {"head_dim": head_dim, "slots": slots, "capacity": capacity, "window": built.case.window}
    names = ("query", "key", "value", "prefix_key", "prefix_value", "slot", "prefix_length", "length")
    return {
        **sizes,
        "scale": built.case.scale,
        "dtype": torch.bfloat16,
        **{name: getattr(built, name) for name in names},
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


# Pages end within tiles of keys (80 at head dimension 256, 64 at 512), and some requests have several splits.
REQUESTS = [Request(300, 7, 0), Request(0, 65, 1), Request(620, 33, 2), Request(9, 5, -1), Request(79, 1, 3)]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("head_dim", "page_size", "layout", "window"), [(256, 16, "keys_beside_values", 260), (512, 96, "rows_first", 0)]
)
def test_bits_of_the_contiguous_form(page_size: int, layout: str, window: int, capability: int, head_dim: int) -> None:
    case = Case(REQUESTS, query_heads=2, key_heads=1, head_dim=head_dim, window=window, capacity=650)
    paged = Paged(case, torch.bfloat16, [False, True, True, False, False], page_size, layout)
    outputs = [run("paged_attention", "paged_attention", of_pages(paged), seed, capability, 9) for seed in SEEDS]
    for output in outputs[1:]:
        assert same_bits(output, outputs[0])
    for causal, kind in ((False, "canvas_attention"), (True, "causal_attention")):
        wanted = run("block_attention", kind, of_slots(paged, paged.causal_of.index(causal)), 1, capability, 9)
        for b, rows in enumerate(paged.rows):
            if paged.causal_of[b] == causal:
                assert same_bits(paged.of_request(outputs[0], b), wanted[b, :rows]), b
    start, end = int(paged.query_start[0]), int(paged.query_start[-1])
    assert bool(outputs[0][:start].isnan().all())
    assert bool(outputs[0][end:].isnan().all())


def far_apart(paged: Paged) -> tuple[Tensor, Tensor]:
    """The pools with pages of more than 2^32 elements, the values of a page behind its keys: nothing in them yet."""
    pages, page_size, heads, head_dim = paged.key_pages.shape
    stride, between = 2**32 + 64, 2**30
    memory = sparse(pages * stride, torch.bfloat16)
    shape, strides = (pages, page_size, heads, head_dim), (stride, heads * head_dim, head_dim, 1)
    return memory.as_strided(shape, strides), memory[between:].as_strided(shape, strides)


def append(paged: Paged, pools: tuple[Tensor, Tensor]) -> None:
    """Stores every row of the case's pages in the same place of these."""
    rows = {"key": paged.key_pages, "value": paged.value_pages}
    slot = torch.arange(rows["key"].shape[0] * rows["key"].shape[1])
    values: dict[str, Any] = {name: x.flatten(0, 1).clone() for name, x in rows.items()}
    pages, page_size, key_heads, head_dim = pools[0].shape
    values |= {"tokens": len(slot), "key_heads": key_heads, "head_dim": head_dim, "pages": pages}
    for name, pool in zip(("key", "value"), pools, strict=True):
        values[f"{name}_pages"] = pool.data_ptr()
        values |= {f"{name}_{axis}_stride": s for axis, s in zip(("page", "row", "head"), pool.stride(), strict=False)}
    op = operation("append_to_pages", {**values, "page_size": page_size, "slot": slot, "dtype": torch.bfloat16})
    cuda = context(where="cuda")
    cuda.stream = library().sim_set_stream(ctypes.c_void_p(2))
    assert library().dgemma_cuda_append_to_pages(ctypes.byref(op), ctypes.byref(cuda)) == 0, cuda.message.decode()


@pytest.mark.parametrize("capability", [80, 90])
def test_pages_may_be_far_apart(capability: int) -> None:
    """As the layers of a model are: what is stored there is read there, and the offsets take 64 bits."""
    case = Case([Request(20, 6, 0), Request(3, 9, 1)], query_heads=2, key_heads=1, head_dim=256)
    paged = Paged(case, torch.bfloat16, [True, False], 16, "rows_first")
    pools = far_apart(paged)
    with gpu(capability, 9, seed=1):
        near = call("paged_attention", "paged_attention", of_pages(paged))
        append(paged, pools)
        paged.key_pages, paged.value_pages = pools
        assert same_bits(call("paged_attention", "paged_attention", of_pages(paged)), near)


@pytest.mark.parametrize("head_dim", [128, 256])  # on 9.0 the path for every GPU, and Hopper's
def test_each_kernel_waits_for_the_one_in_front(head_dim: int) -> None:
    """Storing in pages that the attention in front reads, and attention over what was stored."""
    case = Case([Request(20, 6, 0), Request(3, 9, 1)], query_heads=2, key_heads=1, head_dim=head_dim)
    paged = Paged(case, torch.bfloat16, [True, False], 16, "rows_first")
    with gpu(90, 9, seed=1):
        before = call("paged_attention", "paged_attention", of_pages(paged))
        append(paged, (paged.key_pages, paged.value_pages))
        assert same_bits(call("paged_attention", "paged_attention", of_pages(paged)), before)


@pytest.mark.parametrize("capability", [80, 90])
def test_what_the_host_cannot_check_is_not_read(capability: int) -> None:
    """Lengths that do not fit skip the request, more rows than said are left, and a page that is not there is zeros."""
    requests = [Request(10, 6, 0), Request(10, 6, 1), Request(10, 6, 2), Request(10, 6, 3)]
    case = Case(requests, query_heads=2, key_heads=1, head_dim=256)
    paged = Paged(case, torch.bfloat16, [True, False, True, False], 16, "heads_first", outside=0)
    paged.sequence_length[0] = 5  # less than its rows
    paged.sequence_length[1] = 10_000  # more than the table holds
    paged.page_table[2, 0] = 2**30
    values = of_pages(paged, max_query_length=4)
    output = run("paged_attention", "paged_attention", values, 1, capability, 9)
    for b in (0, 1):
        assert bool(paged.of_request(output, b).isnan().all())
    for b in (2, 3):
        rows = paged.of_request(output, b)
        assert bool(rows[:4].isfinite().all())
        assert bool(rows[4:].isnan().all())
    # A row's scores are all zero, so it is the mean of the values: zeros of the missing page.
    assert bool((paged.of_request(output, 2)[0] == 0).all())
