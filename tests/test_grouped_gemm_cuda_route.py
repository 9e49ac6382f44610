"""The CUDA kernels of the router: run on the host by the test bed, beside the layer's own routing."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dgemma_ext.ops import router
from reference import router as reference
from sim.build import ROOT, SUPPORTED, sim_library

FAMILY = ROOT / "csrc" / "grouped_gemm"
KERNELS = ["sm80/bf16_router_scores", "cuda/router_choice", "cuda/route"]
SOURCES = [FAMILY / f"{name}.cu" for name in KERNELS]
SOURCES += [FAMILY / "cuda" / "plan_route.cpp", ROOT / "csrc" / "cuda" / "entry.cu"]
SOURCES += [ROOT / "tests" / "sim" / "kernels" / "route_plan.cpp"]
# Orders in which the machine runs threads and lets copies land.
SEEDS = [1, 2, 3]
GUARD = 256  # bytes behind the workspace
BFLOAT16 = 1
EPSILON = 1e-6
OK, INVALID_ARGUMENT, UNSUPPORTED, WORKSPACE_TOO_SMALL = 0, 1, 2, 3

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")


class Route(ctypes.Structure):
    """dgemma_route of csrc/include/dgemma/grouped_gemm.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("tokens", "hidden_size", "experts", "top_k")]
        + [("epsilon", ctypes.c_float), ("dtype", ctypes.c_int)]
        + [(name, ctypes.c_void_p) for name in ("input", "scale", "projection", "per_expert_scale")]
        + [(name, ctypes.c_void_p) for name in ("expert_ids", "expert_weights", "workspace")]
        + [("workspace_bytes", ctypes.c_size_t)]
    )


class Cuda(ctypes.Structure):
    """dgemma_cuda of csrc/include/dgemma/base.h."""

    _fields_ = [("stream", ctypes.c_void_p), ("message", ctypes.c_char * 256)]


@cache
def library() -> ctypes.CDLL:
    built = sim_library("grouped_gemm_route", SOURCES)
    built.dgemma_cuda_route_workspace.restype = ctypes.c_size_t
    built.route_plan.restype = ctypes.c_char_p
    return built


@contextmanager
def gpu(capability: int) -> Iterator[None]:
    """The GPU that the test bed plays."""
    library().sim_set_gpu(capability, 3)
    try:
        yield
    finally:
        library().sim_set_gpu(90, 3)


@dataclass
class Case:
    input: Tensor
    scale: Tensor
    projection: Tensor
    per_expert_scale: Tensor
    top_k: int

    def rows(self, rows: list[int]) -> Case:
        return replace(self, input=self.input[rows].contiguous())


def describe(tokens: int, hidden_size: int, experts: int, top_k: int) -> Route:
    return Route(tokens, hidden_size, experts, top_k, EPSILON, BFLOAT16)


def behind(values: Tensor) -> Tensor:
    """The same values with NaN behind them."""
    room = torch.full((len(values) + 1, *values.shape[1:]), float("nan"), dtype=torch.bfloat16)
    room[:-1] = values
    return room[:-1]


def make_case(tokens: int, hidden_size: int, experts: int, top_k: int) -> Case:
    """Inputs are multiples of 1/8 up to 4, so that a sum of squares is exact in any order; some experts are equal."""
    projection = torch.randn(experts, hidden_size)
    if experts > 4:
        projection[experts // 2] = projection[1]
        projection[experts - 1] = projection[0]
    return Case(
        input=behind((torch.randn(tokens, hidden_size) * 8).round().clamp(-32, 32) / 8),
        scale=behind(torch.rand(hidden_size) + 0.5),
        projection=behind(projection),
        per_expert_scale=behind(torch.rand(experts) + 0.5),
        top_k=top_k,
    )


def run(case: Case, seed: int = 1, capability: int = 90) -> tuple[Tensor, Tensor]:
    """Ids and weights of a call into poison, in one of the machine's orders."""
    (tokens, hidden_size), experts = case.input.shape, case.projection.shape[0]
    op, cuda = describe(tokens, hidden_size, experts, case.top_k), Cuda()
    size = library().dgemma_cuda_route_workspace(ctypes.byref(op))
    workspace = torch.full((size + GUARD,), 0xFF, dtype=torch.uint8)
    ids = torch.full((tokens + 1, case.top_k), -7, dtype=torch.int32)
    weights = torch.full((tokens + 1, case.top_k), float("nan"))
    op.input, op.scale, op.projection = case.input.data_ptr(), case.scale.data_ptr(), case.projection.data_ptr()
    op.per_expert_scale = case.per_expert_scale.data_ptr()
    op.expert_ids, op.expert_weights = ids.data_ptr(), weights.data_ptr()
    op.workspace, op.workspace_bytes = workspace.data_ptr(), size
    library().sim_set_seed(ctypes.c_uint64(seed))
    with gpu(capability):
        status = library().dgemma_cuda_route(ctypes.byref(op), ctypes.byref(cuda))
    assert status == OK, cuda.message.decode()
    assert bool((workspace[size:] == 0xFF).all()), "written behind the workspace"
    assert bool((ids[tokens] == -7).all() & weights[tokens].isnan().all()), "written behind the outputs"
    return ids[:tokens], weights[:tokens]


# tokens, hidden_size, experts, top_k
CASES = [
    (1, 2816, 128, 8),  # the model's sizes
    (40, 2816, 128, 8),
    (19, 264, 12, 3),  # tails of everything
    (5, 8, 1, 1),  # the smallest sizes
    (7, 64, 40, 32),  # as many choices as there may be
    (17, 320, 200, 8),  # two tiles of experts
    (3, 128, 1024, 16),  # as many experts as there may be
    (530, 64, 128, 8),  # tiles of 64 tokens
    (2, 4160, 16, 4),  # more segments than eight
]


@pytest.mark.parametrize("capability", [86, 90])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_router_is_right(case: tuple[int, int, int, int], capability: int) -> None:
    made = make_case(*case)
    wanted = reference.route(made.input, made.scale, made.projection, made.per_expert_scale, made.top_k, EPSILON)
    assert int(wanted.sure.sum()) >= case[0] // 2
    first = run(made, SEEDS[0], capability)
    for seed in SEEDS:
        ids, weights = run(made, seed, capability)
        assert torch.equal(ids[wanted.sure].long(), wanted.expert_ids[wanted.sure])
        # exp is off by two units in the last place, sums and divisions by half of one each.
        torch.testing.assert_close(weights[wanted.sure].double(), wanted.expert_weights[wanted.sure], rtol=1e-6, atol=0)
        assert torch.equal(ids, first[0])
        assert torch.equal(weights, first[1])


@pytest.mark.parametrize("magnitude", [1.0, 2.0**-10], ids=["unit", "near epsilon"])
def test_router_is_the_layers(magnitude: float) -> None:
    """transformers' order of operations, as ops/router.py has it in torch."""
    made = make_case(48, 2816, 128, 8)
    made.input = behind(made.input * magnitude)
    operands = (made.input, made.scale, made.projection, made.per_expert_scale)
    layer_ids, layer_weights = router.route(*operands, 8, EPSILON)
    sure = reference.route(made.input, made.scale, made.projection, made.per_expert_scale, 8, EPSILON).sure
    assert int(sure.sum()) >= 24
    ids, found = run(made)
    assert torch.equal(ids[sure], layer_ids[sure])
    torch.testing.assert_close(found[sure], layer_weights[sure], rtol=1e-6, atol=0)


def test_equal_probabilities_go_to_the_lower_expert() -> None:
    """All scores equal; then two groups of equal ones, and probabilities that are zero though scores differ."""
    made = make_case(3, 64, 100, 8)
    made.projection[:] = 0.25
    assert run(made)[0].tolist() == [list(range(8))] * 3
    made.input[:] = 1.0
    made.scale[:] = 1.0
    made.projection[:] = -64.0  # a score of -512 beside 8: the exponential is zero in fp32
    made.projection[50:] = -96.0
    made.projection[[30, 70, 99]] = 1.0
    ids, weights = run(made)
    assert ids.tolist() == [[30, 70, 99, 0, 1, 2, 3, 4]] * 3
    assert bool((weights[:, 3:] == 0).all())
    made.projection[:50] = -96.0  # the other half is nearer now, and as impossible
    made.projection[50:] = -64.0
    made.projection[[30, 70, 99]] = 1.0
    assert run(made)[0].tolist() == [[30, 70, 99, 0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("tokens", [20, 600])
def test_bits_of_a_token_do_not_depend_on_the_others(tokens: int) -> None:
    """Inputs whose sums depend on their order; tiles of 16 tokens and of 64 give the same."""
    made = make_case(tokens, 320, 16, 4)
    made.input = behind(torch.randn(tokens, 320))
    ids, weights = run(made)
    for rows in ([7], list(range(3, 19)), torch.randperm(tokens)[:40].tolist()):
        some_ids, some_weights = run(made.rows(rows), 2)
        assert torch.equal(some_ids, ids[rows])
        assert torch.equal(some_weights, weights[rows])


def test_a_token_that_is_not_finite_leaves_the_others_alone() -> None:
    made = make_case(20, 128, 16, 4)
    expected = run(made)
    made.input[5, 3], made.input[6, 0] = float("nan"), float("inf")
    ids, weights = run(made)
    others = [t for t in range(20) if t not in (5, 6)]
    assert torch.equal(ids[others], expected[0][others])
    assert torch.equal(weights[others], expected[1][others])
    assert bool(((ids >= 0) & (ids < 16)).all())
    assert bool(weights[5:7].isnan().all())


def plan_text(op: Route) -> str:
    numbers, text = (ctypes.c_int64 * 8)(), ctypes.create_string_buffer(2000)
    assert library().route_plan(ctypes.byref(op), numbers, text, ctypes.c_size_t(2000)) is None
    return text.value.decode()


def test_plan_for_the_model() -> None:
    assert plan_text(describe(256, 2816, 128, 8)) == (
        "scores: 128 blocks of 128 threads, 16 token tiles of 16, 1 tiles of 128 experts, 44 steps of 64 in "
        "8 segments\n"
        "choice: 64 blocks of 128 threads\n"
        "workspace: 1048576 bytes\n"
    )
    assert plan_text(describe(4096, 2816, 128, 8)).startswith("scores: 512 blocks of 128 threads, 64 token tiles of 64")


@pytest.mark.parametrize("hidden_size", [8, 64, 72, 512, 2816, 3072, 3080, 65536])
def test_segments_fit_shared_memory(hidden_size: int) -> None:
    """At most six steps each, and none without any; a function of the hidden size alone."""
    counts = set()
    for tokens in (1, 256, 4096):
        numbers, text = (ctypes.c_int64 * 8)(), ctypes.create_string_buffer(2000)
        op = describe(tokens, hidden_size, 128, 8)
        assert library().route_plan(ctypes.byref(op), numbers, text, ctypes.c_size_t(2000)) is None
        k_steps, segments = numbers[1], numbers[2]
        assert k_steps == -(-hidden_size // 64)
        begins = [s * k_steps // segments for s in range(segments + 1)]
        assert all(1 <= end - begin <= 6 for begin, end in pairwise(begins))
        counts.add(segments)
    assert len(counts) == 1


BAD_SIZES = [
    ("tokens", 2**24 + 1, "tokens: wants 0 to 16777216"),
    ("hidden_size", 260, "hidden_size: wants a multiple of 8 up to 65536"),
    ("experts", 1025, "experts: wants 1 to 1024"),
    ("top_k", 33, "top_k: wants 1 to 32"),
    ("top_k", 17, "top_k: wants at most the number of experts"),
    ("epsilon", float("nan"), "epsilon: wants 0 or a little more"),
    ("dtype", 0, "dtype: wants bfloat16"),
]
POINTERS = ["input", "scale", "projection", "per_expert_scale", "expert_ids", "expert_weights", "workspace"]


def described_with_pointers() -> Route:
    op = describe(4, 256, 16, 2)
    for index, pointer in enumerate(POINTERS):  # far from each other
        setattr(op, pointer, (index + 1) << 30)
    return op


@pytest.mark.parametrize(("name", "value", "message"), BAD_SIZES)
def test_sizes_that_are_not_taken(name: str, value: float, message: str) -> None:
    op, cuda = described_with_pointers(), Cuda()
    setattr(op, name, value)
    assert library().dgemma_cuda_route_workspace(ctypes.byref(op)) == 0
    assert library().dgemma_cuda_route(ctypes.byref(op), ctypes.byref(cuda)) == UNSUPPORTED
    assert cuda.message.decode() == message


@pytest.mark.parametrize("address", [None, 2**20 + 1], ids=["null", "odd"])
@pytest.mark.parametrize("name", POINTERS)
def test_bad_pointers(name: str, address: int | None) -> None:
    op, cuda = described_with_pointers(), Cuda()
    setattr(op, name, address)
    assert library().dgemma_cuda_route(ctypes.byref(op), ctypes.byref(cuda)) == INVALID_ARGUMENT
    assert re.fullmatch(rf"{name}: got (NULL, wants .*|0x.*, wants a multiple of \d+ bytes)", cuda.message.decode())


def test_small_workspace() -> None:
    op, cuda = described_with_pointers(), Cuda()
    wanted = library().dgemma_cuda_route_workspace(ctypes.byref(op))
    op.workspace_bytes = wanted - 1
    assert library().dgemma_cuda_route(ctypes.byref(op), ctypes.byref(cuda)) == WORKSPACE_TOO_SMALL
    assert cuda.message.decode() == f"workspace_bytes: got {wanted - 1}, wants at least {wanted}"


def test_no_tokens() -> None:
    op, cuda = describe(0, 256, 16, 2), Cuda()
    assert library().dgemma_cuda_route(ctypes.byref(op), ctypes.byref(cuda)) == OK
