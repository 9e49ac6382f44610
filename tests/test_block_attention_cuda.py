"""The CUDA kernels of attention by their C interface: run on the host by the test bed, their plan walked."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from block_attention_cases import Built, Case, Request
from cuda_tools import find_nvcc
from sim.build import ROOT, SUPPORTED, nvcc_report, sim_library

FAMILY = ROOT / "csrc" / "block_attention"
SOURCES = [*sorted(FAMILY.rglob("*.cu")), FAMILY / "cuda" / "plan.cpp", ROOT / "csrc" / "cuda" / "entry.cu"]
SOURCES += [ROOT / "tests" / "sim" / "kernels" / "attention_plan.cpp"]
# Orders in which the machine runs threads and lets copies and products land.
SEEDS = [1, 2, 3]
GUARD = 256  # bytes before the output and behind output and workspace
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
OK, WORKSPACE_TOO_SMALL = 0, 3


@cache
def library() -> ctypes.CDLL:
    built = sim_library("block_attention", SOURCES)
    built.dgemma_cuda_block_attention_workspace.restype = ctypes.c_size_t
    for name in ("attention_plan", "attention_units", "attention_run", "attention_traffic"):
        getattr(built, name).restype = ctypes.c_char_p
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
def gpu(capability: int, multiprocessors: int = 132) -> Iterator[None]:
    """The GPU that the test bed plays."""
    library().sim_set_gpu(capability, multiprocessors)
    try:
        yield
    finally:
        library().sim_set_gpu(90, 3)


def run(
    built: Built, seed: int, capability: int = 90, with_length: bool = True, by_batch: bool = False, blocks: int = 132
) -> Tensor:
    """The output of a call into poison, in one of the machine's orders; rows that have no query stay NaN.

    `blocks`: multiprocessors of the GPU. `by_batch`: canvas attention whose splits know the batch.
    """
    op = describe(built)
    if not with_length:
        op.length = None
    count, guard = built.query.numel(), GUARD // 2
    guarded = torch.full((count + 2 * guard,), -1, dtype=torch.int16)  # NaN in bfloat16
    op.workspace_bytes = library().dgemma_cuda_block_attention_workspace(ctypes.byref(op))
    workspace = torch.full((op.workspace_bytes + GUARD,), 0xFF, dtype=torch.uint8)
    op.output, op.workspace = guarded.data_ptr() + GUARD, workspace.data_ptr()
    kind = "causal" if built.case.causal else "batched_canvas" if by_batch else "canvas"
    function = getattr(library(), f"dgemma_cuda_{kind}_attention")
    library().sim_set_seed(ctypes.c_uint64(seed))
    cuda = Cuda()
    with gpu(capability, blocks):
        status = function(ctypes.byref(op), ctypes.byref(cuda))
    assert status == OK, cuda.message.decode()
    assert bool((workspace[op.workspace_bytes :] == 0xFF).all()), "written behind the workspace"
    assert bool((guarded[:guard] == -1).all()), "written before the output"
    assert bool((guarded[guard + count :] == -1).all()), "written behind the output"
    return guarded[guard : guard + count].view(torch.bfloat16).reshape(built.query.shape)


def build(case: Case) -> Built:
    built = Built(case, torch.bfloat16)
    built.poison_unseen()
    return built


def check(built: Built, out: Tensor) -> None:
    """Against the oracle; rows without a query are as they were."""
    clean = out.clone()
    for b, request in enumerate(built.case.requests):
        rows = request.rows if request.slot >= 0 else 0
        assert bool(out[b, rows:].isnan().all())
        clean[b, rows:] = 0.0
    built.check(clean)


SLIDING: dict[str, Any] = {"query_heads": 2, "key_heads": 1, "window": 200, "capacity": 199}
# Tiles of keys: 80 at head dimension 256, 64 at 512. Tiles of rows: 128 and 64.
CASES = {
    # One row; the second block of the cluster has none.
    "one_row": Case([Request(3, 1)], query_heads=1, key_heads=1, capacity=5),
    "no_prefix": Case([Request(0, 70)], query_heads=2, key_heads=1, capacity=0),
    # Whole tiles of the prefix and of the block, and nothing else.
    "whole_tiles": Case([Request(320, 160)], query_heads=1, key_heads=1, capacity=640),
    # The ring's end within a tile, the prefix's end within another, a tail.
    "ring": Case([Request(1100, 90)], **SLIDING),
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
    built = build(replace(ALL_CASES[name], head_dim=head_dim))
    outputs = [run(built, seed) for seed in SEEDS]
    check(built, outputs[0])
    for output in outputs[1:]:
        assert same_bits(output, outputs[0])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", ["ring", "causal_spans"])
def test_the_other_path(name: str, head_dim: int) -> None:
    """The kernel for all GPUs, by the same calls."""
    built = build(replace(ALL_CASES[name], head_dim=head_dim))
    check(built, run(built, seed=1, capability=80))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("causal", [False, True])
def test_bits_alone_and_in_a_batch(causal: bool, head_dim: int) -> None:
    """Each request into its own number of splits, with lengths given or not."""
    requests = [Request(530, 5, 1), Request(20, 3, 2), Request(900, 40, 0)]
    shape: dict[str, Any] = {"query_heads": 2, "key_heads": 1, "head_dim": head_dim, "capacity": 950, "causal": causal}
    built = build(Case(requests, block=41, **shape))
    together = run(built, seed=1, blocks=6)  # so few that the batch would matter if it were counted
    check(built, together)
    for b, r in enumerate(requests):
        alone = build(Case([Request(r.prefix, r.rows, 0)], **shape))
        alone.query[0], alone.key[0], alone.value[0] = (x[b, : r.rows] for x in (built.query, built.key, built.value))
        alone.prefix_key[0], alone.prefix_value[0] = built.prefix_key[r.slot], built.prefix_value[r.slot]
        for with_length in (True, False):
            found = run(alone, seed=2, with_length=with_length, blocks=6)[0]
            assert same_bits(found, together[b, : r.rows])


@pytest.mark.parametrize("capability", [80, 90])
def test_splits_that_know_the_batch(capability: int) -> None:
    """Three requests on six multiprocessors, the longest worth three splits: it gets two on sm_90, three on sm_80."""
    requests = [Request(530, 5, 1), Request(20, 3, 2), Request(900, 40, 0)]
    case = Case(requests, block=41, query_heads=1, key_heads=1, head_dim=256, capacity=950)
    built = build(case)
    by_request, by_batch = (run(built, 1, capability, by_batch=b, blocks=6) for b in (False, True))
    check(built, by_batch)
    assert same_bits(by_batch, run(built, 2, capability, by_batch=True, blocks=6))
    assert same_bits(by_batch[1], by_request[1]), "one split either way"
    assert same_bits(by_batch[2], by_request[2]) == (capability == 80)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_cluster_reads_keys_once(head_dim: int) -> None:
    """Whole tiles come by TMA, once for two tiles of rows; cp.async brings the queries alone."""
    keys, rows = {256: (80, 128), 512: (64, 64)}[head_dim]
    # Two or three tiles of rows for each of two key heads; five tiles of keys.
    case = Case([Request(2 * keys, 3 * keys)], query_heads=2, key_heads=2, head_dim=head_dim, capacity=2 * keys)
    built = build(case)
    op, out = describe(built), torch.empty_like(built.query)
    workspace = torch.empty(plan_of(op).workspace_bytes, dtype=torch.uint8)
    op.output, op.workspace, op.workspace_bytes = out.data_ptr(), workspace.data_ptr(), workspace.numel()
    statistics = (ctypes.c_uint64 * 6)()
    library().sim_set_seed(ctypes.c_uint64(1))  # a new call: the memory of an earlier one may have been given out anew
    assert library().attention_traffic(ctypes.byref(op), ctypes.c_bool(False), statistics) is None
    clusters = {256: 1, 512: 2}[head_dim]
    assert -(-3 * keys // rows) in (2 * clusters - 1, 2 * clusters)
    # Keys and values of two heads, two bytes each.
    assert statistics[2] == clusters * 2 * (2 * 5 * keys * head_dim) * 2
    assert statistics[4] == built.query.numel() * 2


@dataclass
class Plan:
    path: int
    rows: int
    keys: int
    row_tiles: int
    splits: int
    partial_tiles: int
    partial: int
    sums: int
    workspace_bytes: int
    text: str


def plan_of(op: BlockAttention, capability: int = 90, multiprocessors: int = 132, by_batch: bool = False) -> Plan:
    numbers, text = (ctypes.c_int64 * 9)(), ctypes.create_string_buffer(500)
    given = (capability, multiprocessors, ctypes.c_bool(by_batch))
    problem = library().attention_plan(ctypes.byref(op), *given, numbers, text, ctypes.c_size_t(500))
    assert problem is None, problem
    return Plan(*numbers, text.value.decode())


# Key heads, head dimension, window and capacity of the model's two kinds of layers, 16 query heads.
LAYERS = {"sliding": (8, 256, 1024, 1023), "full": (2, 512, 0, 12288)}
QUERY_HEADS = 16


def model_layer(layer: str, batch: int = 1, block: int = 256) -> BlockAttention:
    key_heads, head_dim, window, capacity = LAYERS[layer]
    op = BlockAttention(batch, block, QUERY_HEADS, key_heads, head_dim, batch, capacity, window)
    op.scale, op.dtype = 1.0, BFLOAT16
    return op


def integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def units_of(op: BlockAttention, causal: bool) -> np.ndarray:
    """Request, key head, row tile, split, first position, end, tiles of keys and part, of every block with rows."""
    room = ctypes.c_int32(0)
    call = library().attention_units
    assert call(ctypes.byref(op), ctypes.c_bool(causal), None, ctypes.byref(room)) is None
    units = np.full((room.value + 1, 8), -7, dtype=np.int32)
    pointer = units.ctypes.data_as(ctypes.c_void_p)
    assert call(ctypes.byref(op), ctypes.c_bool(causal), pointer, ctypes.byref(room)) is None
    assert room.value == len(units) - 1
    assert bool((units[-1] == -7).all())
    return units[:-1]


def run_of(first: int, keys: int, end: int, prefix: int, capacity: int) -> tuple[int, int]:
    out = (ctypes.c_int32 * 3)()
    assert library().attention_run(first, keys, end, prefix, capacity, out) is None
    assert bool(out[2]) == (out[0] == 2), "a fence too many or too few"
    return out[0], out[1]


PREFIXES = [0, 1, 79, 767, 1022, 1023, 1024, 4096, 5000, 8192]


@pytest.mark.parametrize("given_lengths", [False, True])
@pytest.mark.parametrize(("causal", "block"), [(False, 256), (False, 37), (True, 256), (True, 1500)])
@pytest.mark.parametrize("layer", LAYERS)
def test_units_cover_the_model_once(layer: str, causal: bool, block: int, given_lengths: bool) -> None:
    """At true extents: every row of a request meets every key it sees in one split; parts do not overlap."""
    key_heads, _, window, capacity = LAYERS[layer]
    op = model_layer(layer, len(PREFIXES), block)
    lengths = [max(1, block - 19 * i) for i in range(len(PREFIXES))] if given_lengths else [block] * len(PREFIXES)
    slots, prefixes, length = integers(list(range(len(PREFIXES)))), integers(PREFIXES), integers(lengths)
    op.slot, op.prefix_length = slots.data_ptr(), prefixes.data_ptr()
    op.length = length.data_ptr() if given_lengths else None
    plan = plan_of(op)
    assert plan.path == 90
    group = QUERY_HEADS // key_heads
    units = units_of(op, causal)
    for index, (prefix, rows) in enumerate(zip(PREFIXES, lengths, strict=True)):
        own = units[units[:, 0] == index]
        splits = int(own[:, 3].max()) + 1
        if splits > 1:
            assert len(set(own[:, 7].tolist())) == len(own)
            assert own[:, 7].min() >= index * plan.partial_tiles
            assert own[:, 7].max() < (index + 1) * plan.partial_tiles
        row_tiles = -(-rows * group // plan.rows)
        covered = np.zeros((key_heads, row_tiles, prefix + rows + 1), dtype=np.int64)
        for _, head, tile, _, first, end, tiles, _ in own.tolist():
            if tiles > 0:
                covered[head, tile, first] += 1
                covered[head, tile, min(first + tiles * plan.keys, end)] -= 1
            for number in range(tiles):
                check_run(first + number * plan.keys, plan.keys, end, prefix, capacity)
        covered = covered.cumsum(axis=2)
        for tile in range(row_tiles):
            tokens = range(tile * plan.rows // group, min(rows, -(-(tile + 1) * plan.rows // group)))
            low = max(0, (prefix + tokens[0] if causal else prefix) - window + 1) if window else 0
            high = prefix + (tokens[-1] + 1 if causal else rows)
            assert bool((covered[:, tile, low:high] == 1).all())
            assert int(covered[:, tile].max()) == 1


@cache
def check_run(first: int, keys: int, end: int, prefix: int, capacity: int) -> None:
    """One run of rows where the tile is one, and no row of it that may not be read."""
    source, row = run_of(first, keys, end, prefix, capacity)
    positions = np.arange(first, first + keys)
    in_ring = positions % max(capacity, 1)
    if source == 0:
        assert positions[-1] < prefix
        assert bool((in_ring == np.arange(row, row + keys)).all())
    elif source == 1:
        assert first >= prefix
        assert row == first - prefix
        assert positions[-1] < end
    else:
        whole_prefix = positions[-1] < prefix and bool((np.diff(in_ring) == 1).all())
        assert not whole_prefix
        assert not (first >= prefix and positions[-1] < end)


def test_most_tiles_of_the_model_are_whole() -> None:
    """Of the 16 tiles of a sliding layer three are not: the ring's end, the prefix's end, the last."""
    first = 5000 - 1023
    sources = [run_of(first + 80 * i, 80, 5256, 5000, 1023)[0] for i in range(16)]
    assert sources.count(2) == 3
    sources = [run_of(64 * i, 64, 4352, 4096, 12288)[0] for i in range(68)]
    assert sources.count(2) == 0


def test_plan_for_the_model_on_an_h200() -> None:
    """One canvas is 128 blocks, one for each of 132 multiprocessors."""
    sliding, full = plan_of(model_layer("sliding")), plan_of(model_layer("full"))
    assert (sliding.row_tiles * 8 * sliding.splits, full.row_tiles * 2 * full.splits) == (128, 128)
    assert sliding.text == (
        "sm90 attention: 4 tiles of 128 rows, tiles of 80 keys, up to 4 splits towards 132 blocks of a request, "
        "1 at once on a multiprocessor\n"
        "combine: 1024 blocks of 128 threads for a request\n"
        "workspace: 17436672 bytes\n"
    )
    assert full.text == (
        "sm90 attention: 32 tiles of 64 rows, tiles of 64 keys, up to 2 splits towards 132 blocks of a request, "
        "1 at once on a multiprocessor\n"
        "combine: 1024 blocks of 128 threads for a request\n"
        "workspace: 17369088 bytes\n"
    )


@pytest.mark.parametrize(
    ("capability", "sliding", "full"), [(80, 2, 1), (86, 1, 1), (89, 1, 1), (100, 2, 2), (103, 2, 2), (120, 1, 1)]
)
def test_blocks_share_a_multiprocessor_where_they_fit(capability: int, sliding: int, full: int) -> None:
    for layer, at_once in (("sliding", sliding), ("full", full)):
        assert f"{at_once} at once" in plan_of(model_layer(layer), capability, 100).text


@pytest.mark.parametrize(
    ("multiprocessors", "batch", "sliding", "full"),
    [
        (132, 1, 4, 2),
        (114, 1, 3, 1),  # an H100 on PCIe: 96 and 64 blocks, one wave
        (78, 1, 2, 1),  # an H20
        (132, 2, 2, 1),
        (132, 4, 1, 1),
        (132, 200, 1, 1),
    ],
)
def test_splits_fill_the_gpu_at_hand(multiprocessors: int, batch: int, sliding: int, full: int) -> None:
    """One wave of blocks; only by request does a batch make more."""
    for layer, splits in (("sliding", sliding), ("full", full)):
        op = model_layer(layer, batch)
        assert plan_of(op, 90, multiprocessors, by_batch=True).splits == splits
        by_request = plan_of(op, 90, multiprocessors)
        assert by_request.splits == plan_of(model_layer(layer), 90, multiprocessors).splits
        if splits == 1:
            assert plan_of(op, 90, multiprocessors, by_batch=True).workspace_bytes == 0


@pytest.mark.parametrize(
    ("head_dim", "capability", "path"), [(256, 90, 90), (512, 90, 90), (128, 90, 80), (512, 100, 80)]
)
def test_path(head_dim: int, capability: int, path: int) -> None:
    op = model_layer("full")
    op.head_dim = head_dim
    assert plan_of(op, capability).path == path


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("block", [1, 31, 256, 5000])
def test_workspace_is_enough_for_every_gpu(block: int, batch: int, layer: str) -> None:
    op = model_layer(layer, batch, block)
    for with_lengths in (False, True):
        length = integers([block] * batch)
        op.length = length.data_ptr() if with_lengths else None
        wanted = library().dgemma_cuda_block_attention_workspace(ctypes.byref(op))
        plans = [
            plan_of(op, capability, multiprocessors, by_batch)
            for capability in (80, 90)
            for multiprocessors in (3, 78, 108, 132, 192, 1000)
            for by_batch in (False, True)
        ]
        assert wanted == max(plan.workspace_bytes for plan in plans)
        for plan in plans:
            floats = batch * plan.partial_tiles * plan.rows
            assert plan.partial + 4 * floats * op.head_dim <= plan.sums
            assert plan.sums + 4 * floats * 2 <= plan.workspace_bytes


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_small_workspace(head_dim: int) -> None:
    built = build(replace(ALL_CASES["split"], head_dim=head_dim))
    op, cuda = describe(built), Cuda()
    out = torch.zeros_like(built.query)
    workspace = torch.zeros(2**16, dtype=torch.uint8)
    op.output, op.workspace, op.workspace_bytes = out.data_ptr(), workspace.data_ptr(), 2**16
    with gpu(90):
        assert library().dgemma_cuda_canvas_attention(ctypes.byref(op), ctypes.byref(cuda)) == WORKSPACE_TOO_SMALL
    wanted = plan_of(op).workspace_bytes
    assert cuda.message.decode() == f"workspace_bytes: got 65536, wants at least {wanted}"


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_registers_fit_a_block_of_384_threads(head_dim: int) -> None:
    """They are shared out at launch: 65,536 for 384 threads are at most 168 each. Products are not made to wait."""
    report = nvcc_report(FAMILY / "sm90" / f"bf16_attention_{head_dim}.cu", "90a")
    assert (report.kernels, report.spill_bytes, report.stack_bytes, report.serialized) == (1, 0, 0, 0)
    assert report.registers <= 168
