"""The CUDA kernels of moe_ffn: run on the host by the test bed, their plan walked, compiled for Hopper."""

from __future__ import annotations

import ctypes
import dataclasses
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
from cuda_tools import find_nvcc
from reference import grouped_gemm as reference
from sim.build import ROOT, SUPPORTED, nvcc_report, sim_library
from test_grouped_gemm import Case, make_case

FAMILY = ROOT / "csrc" / "grouped_gemm"
KERNELS = ["cuda/sort_pairs", "cuda/combine"]
KERNELS += [f"{path}/bf16_{name}" for path in ("sm80", "sm90") for name in ("gate_up", "down")]
SOURCES = [FAMILY / f"{name}.cu" for name in [*KERNELS, "cuda/moe"]]
SOURCES += [ROOT / "csrc" / "cuda" / "entry.cu", FAMILY / "cuda" / "plan_moe.cpp"]
SOURCES += [ROOT / "tests" / "sim" / "kernels" / "moe_plan.cpp"]
# Orders in which the machine runs threads and lets copies and products land.
SEEDS = [1, 2, 3]
# Compute capabilities that stand for the two paths.
PATHS = [80, 90]
H200_MULTIPROCESSORS = 132
GUARD = 256  # bytes behind the workspace

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")


class MoeFfn(ctypes.Structure):
    """dgemma_moe_ffn of csrc/include/dgemma/grouped_gemm.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("tokens", "hidden_size", "expert_size", "experts", "top_k")]
        + [("dtype", ctypes.c_int)]
        + [(name, ctypes.c_void_p) for name in ("input", "expert_ids", "expert_weights", "gate_up", "down")]
        + [("output", ctypes.c_void_p), ("workspace", ctypes.c_void_p), ("workspace_bytes", ctypes.c_size_t)]
    )


class Cuda(ctypes.Structure):
    """dgemma_cuda of csrc/include/dgemma/base.h."""

    _fields_ = [("stream", ctypes.c_void_p), ("message", ctypes.c_char * 256)]


BFLOAT16 = 1
OK, INVALID_ARGUMENT, UNSUPPORTED, WORKSPACE_TOO_SMALL = 0, 1, 2, 3


@cache
def library() -> ctypes.CDLL:
    built = sim_library("grouped_gemm", SOURCES)
    built.dgemma_cuda_moe_ffn_workspace.restype = ctypes.c_size_t
    for name in ("moe_plan", "moe_units", "moe_work_tiles_of", "moe_likely_steps", "moe_traffic"):
        getattr(built, name).restype = ctypes.c_char_p
    return built


def describe(tokens: int, hidden_size: int, expert_size: int, experts: int, top_k: int) -> MoeFfn:
    return MoeFfn(tokens, hidden_size, expert_size, experts, top_k, BFLOAT16)


def describe_case(case: Case) -> MoeFfn:
    """Without output and workspace."""
    experts, hidden_size, expert_size = case.down.shape
    op = describe(case.input.shape[0], hidden_size, expert_size, experts, case.expert_ids.shape[1])
    op.input, op.expert_ids, op.expert_weights = (x.data_ptr() for x in case.arguments[:3])
    op.gate_up, op.down = case.gate_up.data_ptr(), case.down.data_ptr()
    return op


def prepare(case: Case) -> tuple[MoeFfn, Tensor, Tensor]:
    """The call, its output and its workspace with bytes behind it, both full of NaN."""
    op = describe_case(case)
    out = torch.full_like(case.input, float("nan"))
    op.workspace_bytes = library().dgemma_cuda_moe_ffn_workspace(ctypes.byref(op))
    workspace = torch.full((op.workspace_bytes + GUARD,), 0xFF, dtype=torch.uint8)
    op.output, op.workspace = out.data_ptr(), workspace.data_ptr()
    return op, out, workspace


@contextmanager
def gpu(capability: int, multiprocessors: int = 3) -> Iterator[None]:
    """The GPU that the test bed plays."""
    library().sim_set_gpu(capability, multiprocessors)
    try:
        yield
    finally:
        library().sim_set_gpu(90, 3)


def run(case: Case, seed: int, capability: int = 90) -> tuple[Tensor, Tensor]:
    """Output and workspace of a call into poison, in one of the machine's orders."""
    op, out, workspace = prepare(case)
    library().sim_set_seed(ctypes.c_uint64(seed))
    cuda = Cuda()
    with gpu(capability):
        status = library().dgemma_cuda_moe_ffn(ctypes.byref(op), ctypes.byref(cuda))
    assert status == OK, cuda.message.decode()
    assert bool((workspace[op.workspace_bytes :] == 0xFF).all()), "written behind the workspace"
    return out, workspace[: op.workspace_bytes]


@dataclass
class Plan:
    tokens_per_pass: int
    token_tile: int
    stages: int
    gate_up_weight_tiles: int
    gate_up_k_steps: int
    gate_up_blocks: int
    down_weight_tiles: int
    down_k_steps: int
    down_blocks: int
    first: int
    tiles_before: int
    pair: int
    workspace_bytes: int
    contiguous: int
    likely_steps: int
    text: str


def plan_of(op: MoeFfn, capability: int = 90, multiprocessors: int = H200_MULTIPROCESSORS) -> Plan:
    numbers, text = (ctypes.c_int64 * 15)(), ctypes.create_string_buffer(2000)
    problem = library().moe_plan(ctypes.byref(op), capability, multiprocessors, numbers, text, ctypes.c_size_t(2000))
    assert problem is None, problem
    return Plan(*numbers, text.value.decode())


# tokens, hidden_size, expert_size, experts, top_k, routing
CASES = [
    (1, 256, 128, 8, 1, "distinct"),
    (1, 512, 192, 8, 8, "distinct"),
    (24, 512, 128, 8, 3, "distinct"),
    (13, 2816, 704, 1, 1, "distinct"),  # the model's sizes for one expert
    (19, 320, 192, 8, 2, "distinct"),  # a weight tile of down that reaches past the last row
    (9, 264, 72, 3, 2, "holes"),  # tails of everything, beside rows that must not be read
    (3, 8, 8, 2, 1, "distinct"),  # the smallest sizes
    (150, 256, 128, 8, 1, "one expert"),  # an expert with all, the others with none; three token tiles
    (31, 256, 192, 8, 5, "repeated"),  # a token with one expert in several slots
    (40, 256, 128, 8, 4, "holes"),
    (5, 256, 128, 8, 4, "nothing"),
    (70, 256, 128, 8, 8, "distinct"),  # a token tile of 128, three quarters of it
    (117, 128, 64, 2, 1, "holes"),  # of 128, unevenly
    (150, 128, 64, 1, 1, "distinct"),  # of 256, three quarters of it
    (301, 128, 64, 1, 1, "distinct"),  # of 256, full, and a quarter
    (257, 128, 64, 2, 2, "distinct"),  # of 256, full, and one
]


@pytest.mark.parametrize("capability", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_right(case: tuple[int, int, int, int, int, str], capability: int) -> None:
    made = make_case(*case[:5], dtype=torch.bfloat16, routing=case[5])
    exact = reference.moe_ffn(*made.arguments)
    low = reference.moe_ffn_rounded(*made.arguments)
    outputs = [run(made, seed, capability)[0] for seed in SEEDS]
    for output in outputs:
        assert_close(output, exact, torch.bfloat16, low)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("capability", PATHS)
def test_gelu_is_right_to_rounding(capability: int) -> None:
    """One value by itself in every row: what an error of the curve does is lost in sums."""
    size = 128
    gate = torch.linspace(-6, 6, size).bfloat16()
    case = Case(
        input=torch.eye(1, size, dtype=torch.bfloat16),
        expert_ids=torch.zeros(1, 1, dtype=torch.int32),
        expert_weights=torch.ones(1, 1),
        gate_up=torch.zeros(1, 2 * size, size, dtype=torch.bfloat16),
        down=torch.eye(size, dtype=torch.bfloat16)[None].clone(),
    )
    case.gate_up[0, :size, 0], case.gate_up[0, size:, 0] = gate, 1.0
    exact = torch.from_numpy(reference.gelu_tanh(gate.double().numpy()))
    error = (run(case, seed=1, capability=capability)[0][0].double() - exact).abs()
    # Half a unit in the last place of bfloat16 is at most 2^-8 of the value; the reference cancels near zero.
    assert bool((error <= 1.01 * 2**-8 * exact.abs() + 1e-12).all())


def test_every_token_tile_is_run() -> None:
    assert {plan_of(describe(*case[:5]), 90).token_tile for case in CASES} == {64, 128, 256}
    assert {plan_of(describe(*case[:5]), 80).token_tile for case in CASES} == {32, 64, 128}


@pytest.mark.parametrize("capability", PATHS)
def test_two_passes(capability: int) -> None:
    """16,384 tokens of three pairs: more than one pass takes."""
    made = make_case(16384, 8, 8, 5, 3, dtype=torch.bfloat16, routing="holes")
    assert plan_of(describe_case(made)).tokens_per_pass == 32768 // 3
    output, _ = run(made, seed=1, capability=capability)
    assert_close(output, reference.moe_ffn(*made.arguments), torch.bfloat16, reference.moe_ffn_rounded(*made.arguments))


@pytest.mark.parametrize("capability", PATHS)
def test_bits_of_a_token_do_not_depend_on_the_others(capability: int) -> None:
    made = make_case(75, 256, 128, 4, 2, dtype=torch.bfloat16, routing="distinct")
    together, _ = run(made, seed=1, capability=capability)
    for rows in ([3], list(range(20)), torch.randperm(75).tolist()):
        assert torch.equal(run(made.rows(rows), seed=2, capability=capability)[0], together[rows])


@pytest.mark.parametrize("capability", [86, 100, 120])
@pytest.mark.parametrize("case", [CASES[2], CASES[11], CASES[14]], ids=str)
def test_other_gpus(case: tuple[int, int, int, int, int, str], capability: int) -> None:
    """Every token tile within the shared memory of each; the bits are those of 8.0."""
    made = make_case(*case[:5], dtype=torch.bfloat16, routing=case[5])
    assert torch.equal(run(made, 1, capability)[0], run(made, 1, 80)[0])


def test_ids_out_of_range_are_skipped() -> None:
    made = make_case(12, 256, 128, 8, 4, dtype=torch.bfloat16, routing="holes")
    expected, _ = run(made, seed=1)
    holes = made.expert_ids == -1
    bad = torch.tensor([8, -2, 2**31 - 1, -(2**31)], dtype=torch.int32)
    made.expert_ids[holes] = bad.repeat(12)[: int(holes.sum())]
    assert torch.equal(run(made, seed=1)[0], expected)


@pytest.mark.parametrize("capability", PATHS)
def test_weights_are_read_once(capability: int) -> None:
    """Once for every expert that is hit, on Hopper by TMA; token rows once per weight tile."""
    # On sm_80 with tails, of which nothing is read; TMA counts whole tiles.
    hidden_size, expert_size = (256, 192) if capability == 90 else (264, 200)
    made = make_case(40, hidden_size, expert_size, 16, 2, dtype=torch.bfloat16, routing="holes")
    pairs = int((made.expert_ids >= 0).sum())
    hit = len(made.expert_ids[made.expert_ids >= 0].unique())
    op, _, _workspace = prepare(made)
    statistics = ((ctypes.c_uint64 * 6) * 4)()
    library().sim_set_seed(ctypes.c_uint64(1))  # memory of earlier calls may have been given out anew
    assert library().moe_traffic(ctypes.byref(op), capability, statistics) is None
    # Third and fifth: bytes that bulk copies and cp.async read from global memory.
    _, gate_up, down, _ = [(row[2], row[4]) for row in statistics]
    tile = 128 if capability == 90 else 64
    weights = (2 * hit * 2 * expert_size * hidden_size, 2 * hit * hidden_size * expert_size)
    rows = (2 * pairs * hidden_size * -(-2 * expert_size // tile), 2 * pairs * expert_size * -(-hidden_size // tile))
    if capability == 90:
        assert (gate_up, down) == tuple(zip(weights, rows, strict=True))
    else:
        assert (gate_up, down) == ((0, weights[0] + rows[0]), (0, weights[1] + rows[1]))


def tables_of(ids: Tensor, experts: int, token_tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """first and tiles_before [experts + 1], pairs by expert: what sort_pairs.cu writes."""
    flat = ids.flatten().numpy()
    counts = np.array([(flat == e).sum() for e in range(experts)])
    first = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    tiles = np.concatenate([[0], (-(-counts // token_tile)).cumsum()]).astype(np.int32)
    pair = np.concatenate([np.flatnonzero(flat == e) for e in range(experts)]).astype(np.int32)
    return first, tiles, pair


@pytest.mark.parametrize("routing", ["distinct", "repeated", "holes", "one expert", "nothing"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 8), (300, 37, 7), (256, 128, 8), (40, 1000, 5)])
def test_sorted_pairs(tokens: int, experts: int, top_k: int, routing: str) -> None:
    made = make_case(tokens, 8, 8, experts, top_k, dtype=torch.bfloat16, routing=routing)
    plan = plan_of(describe_case(made))
    first, tiles_before, pair = tables_of(made.expert_ids, experts, plan.token_tile)
    _, workspace = run(made, seed=5)
    ints = workspace.numpy().view(np.int32)
    assert np.array_equal(ints[plan.first // 4 :][: experts + 1], first)
    assert np.array_equal(ints[plan.tiles_before // 4 :][: experts + 1], tiles_before)
    assert np.array_equal(ints[plan.pair // 4 :][: first[-1]], pair)


def even_case(tokens: int, hidden_size: int, expert_size: int, experts: int, top_k: int) -> Case:
    """As many pairs for every expert."""
    made = make_case(tokens, hidden_size, expert_size, experts, top_k, dtype=torch.bfloat16, routing="distinct")
    return dataclasses.replace(made, expert_ids=even_ids(tokens, experts, top_k))


def even_ids(tokens: int, experts: int, top_k: int) -> Tensor:
    return (torch.arange(tokens * top_k, dtype=torch.int32) % experts).view(tokens, top_k)


def prefetches(library: ctypes.CDLL) -> tuple[int, int]:
    """Boxes that blocks asked the L2 for since the last call, and how many of them the same block loaded."""
    counts = (ctypes.c_uint64 * 2)()
    library.sim_prefetches(counts)
    return counts[0], counts[1]


def test_the_likely_weights_are_fetched_early() -> None:
    """Where all experts have pairs each box is one that the block loads; where few tokens come none is asked for."""
    run(even_case(20, 256, 192, 5, 2), seed=1)
    prefetches(library())
    case = even_case(20, 256, 192, 5, 2)
    plan = plan_of(describe_case(case), 90, 3)
    assert plan.likely_steps == plan.stages == 9
    output, _ = run(case, seed=2)
    # Three blocks, two kernels: of gate and up 5 experts by 3 weight tiles of 4 steps, of down by 2 of 3.
    assert prefetches(library()) == (3 * (9 + 9), 3 * (9 + 9))
    assert_close(output, reference.moe_ffn(*case.arguments), torch.bfloat16, reference.moe_ffn_rounded(*case.arguments))
    run(even_case(15, 256, 192, 5, 2), seed=1)
    assert prefetches(library()) == (0, 0)


BAD_SIZES = [
    ("tokens", -1, "tokens: wants 0 to 2147483647"),
    ("top_k", 0, "top_k: wants 1 to 32768"),
    ("experts", 1025, "experts: wants 1 to 1024"),
    ("hidden_size", 260, "hidden_size: wants a multiple of 8 up to 65536"),
    ("expert_size", 65544, "expert_size: wants a multiple of 8 up to 65536"),
    ("dtype", 0, "dtype: wants bfloat16"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_SIZES)
def test_sizes_that_are_not_taken(name: str, value: int, message: str) -> None:
    op = describe(4, 256, 128, 8, 2)
    setattr(op, name, value)
    cuda = Cuda()
    assert library().dgemma_cuda_moe_ffn_workspace(ctypes.byref(op)) == 0
    assert library().dgemma_cuda_moe_ffn(ctypes.byref(op), ctypes.byref(cuda)) == UNSUPPORTED
    assert cuda.message.decode() == message


POINTERS = ["input", "expert_ids", "expert_weights", "gate_up", "down", "output", "workspace"]


@pytest.mark.parametrize("address", [None, 2**20 + 2], ids=["null", "odd"])
@pytest.mark.parametrize("name", POINTERS)
def test_bad_pointers(name: str, address: int | None) -> None:
    op, cuda = describe(4, 256, 128, 8, 2), Cuda()
    for index, pointer in enumerate(POINTERS):  # far from each other
        setattr(op, pointer, (index + 1) << 30)
    setattr(op, name, address)
    assert library().dgemma_cuda_moe_ffn(ctypes.byref(op), ctypes.byref(cuda)) == INVALID_ARGUMENT
    assert re.fullmatch(rf"{name}: got (NULL, wants .*|0x.*, wants a multiple of \d+ bytes)", cuda.message.decode())


def test_small_workspace() -> None:
    op, cuda = describe(4, 256, 128, 8, 2), Cuda()
    for index, pointer in enumerate(POINTERS):  # far from each other
        setattr(op, pointer, (index + 1) << 30)
    wanted = library().dgemma_cuda_moe_ffn_workspace(ctypes.byref(op))
    op.workspace_bytes = wanted - 1
    assert library().dgemma_cuda_moe_ffn(ctypes.byref(op), ctypes.byref(cuda)) == WORKSPACE_TOO_SMALL
    assert cuda.message.decode() == f"workspace_bytes: got {wanted - 1}, wants at least {wanted}"


def test_no_tokens() -> None:
    op, cuda = describe(0, 256, 128, 8, 2), Cuda()
    assert library().dgemma_cuda_moe_ffn(ctypes.byref(op), ctypes.byref(cuda)) == OK


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("sm90/")])
def test_registers_fit_a_block_of_384_threads(name: str) -> None:
    """They are shared out at launch: 65,536 for 384 threads are at most 168 each."""
    report = nvcc_report(FAMILY / f"{name}.cu", "90a")
    assert report.kernels == 3  # one per token tile
    assert report.registers <= 168
