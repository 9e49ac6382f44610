"""The CUDA kernels of the dense projection: run on the host by the test bed, their plan walked."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from bounds import assert_close
from reference import dense as reference
from sim.build import ROOT, SUPPORTED, sim_library

FAMILY = ROOT / "csrc" / "grouped_gemm"
KERNELS = ["sm80/bf16_dense", "sm90/bf16_dense", "cuda/sum_segments", "cuda/dense"]
SOURCES = [FAMILY / f"{name}.cu" for name in KERNELS]
SOURCES += [FAMILY / "cuda" / f"plan_{name}.cpp" for name in ("moe", "dense")]
SOURCES += [ROOT / "csrc" / "cuda" / "entry.cu"]
SOURCES += [ROOT / "tests" / "sim" / "kernels" / "dense_plan.cpp"]
# Orders in which the machine runs threads and lets copies and products land.
SEEDS = [1, 2, 3]
# Compute capabilities that stand for the two paths.
PATHS = [86, 90]
GUARD = 256  # bytes behind the workspace and the output
BFLOAT16 = 1
OK, INVALID_ARGUMENT, UNSUPPORTED, WORKSPACE_TOO_SMALL = 0, 1, 2, 3

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")


class Dense(ctypes.Structure):
    """dgemma_dense of csrc/include/dgemma/grouped_gemm.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("rows", "in_features", "out_features")]
        + [("dtype", ctypes.c_int)]
        + [(name, ctypes.c_void_p) for name in ("input", "weight", "output", "workspace")]
        + [("workspace_bytes", ctypes.c_size_t)]
    )


class Cuda(ctypes.Structure):
    """dgemma_cuda of csrc/include/dgemma/base.h."""

    _fields_ = [("stream", ctypes.c_void_p), ("message", ctypes.c_char * 256)]


@cache
def library() -> ctypes.CDLL:
    built = sim_library("grouped_gemm_dense", SOURCES)
    built.dgemma_cuda_dense_workspace.restype = ctypes.c_size_t
    for name in ("dense_plan", "dense_units"):
        getattr(built, name).restype = ctypes.c_char_p
    return built


@contextmanager
def gpu(capability: int, multiprocessors: int = 3) -> Iterator[None]:
    """The GPU that the test bed plays."""
    library().sim_set_gpu(capability, multiprocessors)
    try:
        yield
    finally:
        library().sim_set_gpu(90, 3)


def describe(rows: int, in_features: int, out_features: int) -> Dense:
    return Dense(rows, in_features, out_features, BFLOAT16)


@dataclass
class Plan:
    token_tile: int
    weight_rows: int
    weight_tiles: int
    token_tiles: int
    k_steps: int
    segments: int
    apart: int
    blocks: int
    sum_blocks: int
    workspace_bytes: int
    text: str


def plan_of(op: Dense, capability: int = 90, multiprocessors: int = 132) -> Plan:
    numbers, text = (ctypes.c_int64 * 10)(), ctypes.create_string_buffer(2000)
    problem = library().dense_plan(ctypes.byref(op), capability, multiprocessors, numbers, text, ctypes.c_size_t(2000))
    assert problem is None, problem
    return Plan(*numbers, text.value.decode())


def make(rows: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """Input and weight; behind each of them lies NaN."""
    input = torch.full((rows + 1, in_features), float("nan"), dtype=torch.bfloat16)
    input[:rows] = torch.randn(rows, in_features)
    weight = torch.full((out_features + 1, in_features), float("nan"), dtype=torch.bfloat16)
    weight[:out_features] = torch.randn(out_features, in_features) / in_features**0.5
    return input[:rows], weight[:out_features]


def run(input: Tensor, weight: Tensor, seed: int, capability: int) -> Tensor:
    """The output of a call into poison, in one of the machine's orders."""
    rows, out_features = input.shape[0], weight.shape[0]
    op, cuda = describe(rows, input.shape[1], out_features), Cuda()
    size = library().dgemma_cuda_dense_workspace(ctypes.byref(op))
    workspace = torch.full((size + GUARD,), 0xFF, dtype=torch.uint8)
    out = torch.full((rows * out_features + GUARD,), float("nan"), dtype=torch.bfloat16)
    op.input, op.weight, op.output = input.data_ptr(), weight.data_ptr(), out.data_ptr()
    op.workspace, op.workspace_bytes = (workspace.data_ptr() if size else None), size
    library().sim_set_seed(ctypes.c_uint64(seed))
    with gpu(capability):
        status = library().dgemma_cuda_dense(ctypes.byref(op), ctypes.byref(cuda))
    assert status == OK, cuda.message.decode()
    assert bool((workspace[size:] == 0xFF).all()), "written behind the workspace"
    assert bool(out[rows * out_features :].isnan().all()), "written behind the output"
    return out[: rows * out_features].view(rows, out_features)


# rows, in_features, out_features
CASES = [
    (1, 256, 64),
    (5, 264, 72),  # tails of everything
    (3, 8, 8),  # the smallest sizes
    (16, 2816, 128),  # the model's depth, eleven segments
    (33, 1160, 136),  # segments of four and five steps
    (65, 512, 192),
    (200, 320, 64),  # a token tile of 128 and one that is not full
    (100, 640, 200),
    (17, 256, 8456),  # so many features that segments are not cut
    (129, 264, 8456),  # and so many tiles that they would be taken in turn
]


@pytest.mark.parametrize("capability", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_right(case: tuple[int, int, int], capability: int) -> None:
    input, weight = make(*case)
    exact, low = reference.dense(input, weight), reference.dense_rounded(input, weight)
    seeds = SEEDS if case[0] * case[1] * case[2] < 2**23 else SEEDS[:1]
    outputs = [run(input, weight, seed, capability) for seed in seeds]
    for output in outputs:
        assert_close(output, exact, torch.bfloat16, low)
        assert torch.equal(output, outputs[0])


@pytest.mark.parametrize("capability", PATHS)
def test_segments_in_turn_give_the_same_bits(capability: int) -> None:
    """Enough rows that a unit takes all segments of its tile; each row as if it had come alone."""
    in_features, out_features = 768, 48
    input, weight = make(132 * 128, in_features, out_features)
    many, few = describe(len(input), in_features, out_features), describe(40, in_features, out_features)
    assert not plan_of(many, capability).apart
    assert plan_of(few, capability).apart
    assert plan_of(few, capability).segments == 3
    chosen = torch.randperm(len(input))[:40]
    together = run(input, weight, 1, capability)
    assert torch.equal(run(input[chosen].contiguous(), weight, 2, capability), together[chosen])
    assert torch.equal(run(input[-1:].contiguous(), weight, 3, capability), together[-1:])


@pytest.mark.parametrize("capability", PATHS)
def test_bits_of_a_row_do_not_depend_on_the_others(capability: int) -> None:
    input, weight = make(150, 1024, 72)
    together = run(input, weight, 1, capability)
    for rows in ([7], list(range(30)), list(range(90, 150)), torch.randperm(150).tolist()):
        assert torch.equal(run(input[rows].contiguous(), weight, 2, capability), together[rows])


# The projections of the model, and sizes with tails.
MATRICES = [(2816, 4096), (2816, 2048), (4096, 2816), (2816, 8192), (8192, 2816), (2816, 2112), (2112, 2816)]
MATRICES += [(8, 8), (264, 72), (65536, 128)]


@pytest.mark.parametrize("capability", PATHS)
@pytest.mark.parametrize("rows", [1, 33, 256, 512, 4096])
@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_units_cover_the_product_once(matrix: tuple[int, int], rows: int, capability: int) -> None:
    op = describe(rows, *matrix)
    plan = plan_of(op, capability)
    count = ctypes.c_int32()
    library().dense_units(ctypes.byref(op), capability, None, ctypes.byref(count))
    units = np.full((count.value + 1, 5), -7, dtype=np.int32)
    library().dense_units(ctypes.byref(op), capability, units.ctypes.data_as(ctypes.c_void_p), ctypes.byref(count))
    assert (units[-1] == -7).all()
    covered = np.zeros((plan.weight_tiles, plan.token_tiles, plan.k_steps), dtype=np.int64)
    for weight_tile, first, unit_rows, step, steps in units[:-1]:
        assert first % plan.token_tile == 0
        assert unit_rows == min(plan.token_tile, rows - first)
        assert steps >= 1
        covered[weight_tile, first // plan.token_tile, step : step + steps] += 1
    assert (covered == 1).all()
    assert plan.weight_tiles * plan.weight_rows >= matrix[1] > (plan.weight_tiles - 1) * plan.weight_rows
    assert plan.k_steps * 64 >= matrix[0]
    assert plan.segments == plan_of(describe(7, *matrix), 176 - capability).segments, "not the matrix's alone"
    assert plan.workspace_bytes == plan_of(op, 176 - capability, 20).workspace_bytes


@pytest.mark.parametrize(
    ("matrix", "units"),
    [((2816, 4096), 128), ((2816, 2048), 128), ((4096, 2816), 132), ((2816, 8192), 128), ((2816, 2112), 102)],
)
def test_a_canvas_fills_an_h200(matrix: tuple[int, int], units: int) -> None:
    plan = plan_of(describe(256, *matrix))
    assert plan.blocks == units


def test_plan_of_a_query_projection() -> None:
    assert plan_of(describe(256, 2816, 4096)).text == (
        "product: 128 blocks of 384 threads, 32 weight tiles of 128 rows, 2 token tiles of 128, 44 steps of 64 in "
        "2 segments apart, 6 stages of 32768 bytes\n"
        "sum: 1024 blocks of 128 threads\n"
        "workspace: 8388608 bytes\n"
    )
    assert plan_of(describe(4096, 2816, 4096), 80, 108).text == (
        "product: 216 blocks of 128 threads, 64 weight tiles of 64 rows, 32 token tiles of 128, 44 steps of 64 in "
        "2 segments in turn, 3 stages of 24576 bytes\n"
        "sum: 0 blocks of 128 threads\n"
        "workspace: 0 bytes\n"
    )


BAD_SIZES = [
    ("rows", -1, "rows: wants 0 to 2147483647"),
    ("in_features", 260, "in_features: wants a multiple of 8 up to 65536"),
    ("out_features", 65544, "out_features: wants a multiple of 8 up to 65536"),
    ("dtype", 0, "dtype: wants bfloat16"),
]
POINTERS = ["input", "weight", "output", "workspace"]


def described_with_pointers() -> Dense:
    op = describe(4, 512, 128)
    for index, pointer in enumerate(POINTERS):  # far from each other
        setattr(op, pointer, (index + 1) << 30)
    return op


@pytest.mark.parametrize(("name", "value", "message"), BAD_SIZES)
def test_sizes_that_are_not_taken(name: str, value: int, message: str) -> None:
    op, cuda = described_with_pointers(), Cuda()
    setattr(op, name, value)
    assert library().dgemma_cuda_dense_workspace(ctypes.byref(op)) == 0
    assert library().dgemma_cuda_dense(ctypes.byref(op), ctypes.byref(cuda)) == UNSUPPORTED
    assert cuda.message.decode() == message


@pytest.mark.parametrize("address", [None, 2**20 + 2], ids=["null", "odd"])
@pytest.mark.parametrize("name", POINTERS)
def test_bad_pointers(name: str, address: int | None) -> None:
    op, cuda = described_with_pointers(), Cuda()
    setattr(op, name, address)
    assert library().dgemma_cuda_dense(ctypes.byref(op), ctypes.byref(cuda)) == INVALID_ARGUMENT
    assert re.fullmatch(rf"{name}: got (NULL, wants .*|0x.*, wants a multiple of \d+ bytes)", cuda.message.decode())


def test_small_workspace() -> None:
    op, cuda = described_with_pointers(), Cuda()
    wanted = library().dgemma_cuda_dense_workspace(ctypes.byref(op))
    op.workspace_bytes = wanted - 1
    assert library().dgemma_cuda_dense(ctypes.byref(op), ctypes.byref(cuda)) == WORKSPACE_TOO_SMALL
    assert cuda.message.decode() == f"workspace_bytes: got {wanted - 1}, wants at least {wanted}"


def test_no_rows() -> None:
    op, cuda = describe(0, 256, 128), Cuda()
    assert library().dgemma_cuda_dense(ctypes.byref(op), ctypes.byref(cuda)) == OK
