"""The CUDA kernels over quantized weights: run on the host by the test bed, every code of every format decoded."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bounds import assert_close
from quantized_matrices import FIRST_FORMATS, FORMATS, FP8, Format, Matrix, Quantized, packed, quantize
from reference import dense as dense_reference
from reference import grouped_gemm as reference
from sim.build import ROOT, SUPPORTED, sim_library
from test_grouped_gemm import route
from test_grouped_gemm_cuda import Cuda, MoeFfn
from test_grouped_gemm_cuda_dense import Dense

FAMILY = ROOT / "csrc" / "grouped_gemm"
KERNELS = [f"cuda/{name}" for name in ("sort_pairs", "combine", "sum_segments", "quantize_rows")]
KERNELS += ["cuda/sum_int8_segments", "cuda/quantize_rows_int8"]
KERNELS += [f"cuda/{name}" for name in ("moe", "dense", "quantized", "fp8")]
KERNELS += [f"sm80/{kind}_{name}" for kind in ("bf16", "quantized", "int8") for name in ("gate_up", "down", "dense")]
KERNELS += [f"sm90/{kind}_{name}" for kind in ("bf16", "fp8", "quantized") for name in ("gate_up", "down")]
KERNELS += ["sm90/bf16_dense", "sm89/fp8_gate_up", "sm89/fp8_down"]
SOURCES = [FAMILY / f"{name}.cu" for name in KERNELS] + [ROOT / "csrc" / "cuda" / "entry.cu"]
SOURCES += [FAMILY / "cuda" / f"plan_{name}.cpp" for name in ("moe", "dense", "quantized", "fp8")]
SOURCES += [ROOT / "tests" / "sim" / "kernels" / "quantized_plan.cpp"]
SEEDS = [1, 2, 3]
GUARD = 256  # bytes behind the workspace and the output
NAN = float("nan")
BFLOAT16 = 1
OK, INVALID_ARGUMENT, UNSUPPORTED, WORKSPACE_TOO_SMALL = 0, 1, 2, 3

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")


class MoeFfnQuantized(ctypes.Structure):
    """dgemma_moe_ffn_quantized."""

    _fields_ = [("ffn", MoeFfn), ("gate_up", Quantized), ("down", Quantized)]


class DenseQuantized(ctypes.Structure):
    """dgemma_dense_quantized."""

    _fields_ = [("dense", Dense), ("weight", Quantized)]


@cache
def library() -> ctypes.CDLL:
    built = sim_library("grouped_gemm_quantized", SOURCES)
    for name in ("moe_ffn_quantized", "dense_quantized", "moe_ffn_fp8"):
        getattr(built, f"dgemma_cuda_{name}_workspace").restype = ctypes.c_size_t
    for name in (
        "moe_quantized_plan",
        "dense_quantized_plan",
        "moe_fp8_plan",
        "quantize_rows",
        "quantize_rows_int8",
        "bytes_copied",
        "decode_sm90",
    ):
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


@dataclass
class Case:
    input: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    gate_up: Matrix
    down: Matrix

    def rows(self, rows: list[int]) -> Case:
        input, ids, weights = (x[rows].contiguous() for x in (self.input, self.expert_ids, self.expert_weights))
        return Case(input, ids, weights, self.gate_up, self.down)

    def exact(self) -> tuple[np.ndarray[Any, Any], Tensor]:
        """In float64, and in bfloat16 steps."""
        call = self.input, self.expert_ids, self.expert_weights
        weights = self.gate_up.exact(), self.down.exact()
        rounded = reference.moe_ffn_rounded(*call, *(w.bfloat16() for w in weights))
        return reference.moe_ffn(*call, *weights), rounded


Sizes = tuple[int, int, int, int, int, str]


def make_case(sizes: Sizes, gate_up: Format, down: Format | None = None) -> Case:
    tokens, hidden, expert, experts, top_k, routing = sizes
    ids = route(routing, tokens, experts, top_k)
    gate_up_weight = torch.randn(experts, 2 * expert, hidden) / hidden**0.5
    gate_up_weight[:, expert:] *= 1.7  # so that the factors of gate and up differ
    case = Case(
        input=torch.randn(tokens, hidden).bfloat16(),
        expert_ids=ids,
        expert_weights=torch.rand(tokens, top_k) + 0.1,
        gate_up=quantize(gate_up_weight, gate_up, expert),
        down=quantize(torch.randn(experts, hidden, expert) / expert**0.5, down or gate_up, hidden),
    )
    case.input[(ids < 0).all(dim=1)] = NAN
    case.expert_weights[ids < 0] = NAN
    # What belongs to an expert that no token goes to is not read: its factors are NaN.
    missed = [e for e in range(experts) if not bool((ids == e).any())]
    for matrix in (case.gate_up, case.down):
        assert matrix.factors is not None
        matrix.factors.view(experts, -1)[missed] = NAN
    return case


def describe(case: Case) -> MoeFfnQuantized:
    tokens, hidden = case.input.shape
    experts, rows = case.gate_up.values.shape[:2]
    ffn = MoeFfn(tokens, hidden, rows // 2, experts, case.expert_ids.shape[1], BFLOAT16)
    ffn.input, ffn.expert_ids = case.input.data_ptr(), case.expert_ids.data_ptr()
    ffn.expert_weights = case.expert_weights.data_ptr()
    return MoeFfnQuantized(ffn, case.gate_up.describe(), case.down.describe())


def run(case: Case, seed: int = 1, capability: int = 80, name: str = "moe_ffn_quantized") -> Tensor:
    """The output of a call into poison, in one of the machine's orders."""
    op, cuda = describe(case), Cuda()
    size = getattr(library(), f"dgemma_cuda_{name}_workspace")(ctypes.byref(op))
    workspace = torch.full((size + GUARD,), 0xFF, dtype=torch.uint8)
    out = torch.full((case.input.numel() + GUARD,), NAN, dtype=torch.bfloat16)
    op.ffn.output, op.ffn.workspace, op.ffn.workspace_bytes = out.data_ptr(), workspace.data_ptr(), size
    library().sim_set_seed(ctypes.c_uint64(seed))
    with gpu(capability):
        status = getattr(library(), f"dgemma_cuda_{name}")(ctypes.byref(op), ctypes.byref(cuda))
    assert status == OK, cuda.message.decode()
    assert bool((workspace[size:] == 0xFF).all()), "written behind the workspace"
    assert bool(out[case.input.numel() :].isnan().all()), "written behind the output"
    return out[: case.input.numel()].view(case.input.shape)


# tokens, hidden_size, expert_size, experts, top_k, routing
CASES: list[Sizes] = [
    (24, 512, 128, 8, 3, "distinct"),
    (9, 288, 96, 3, 2, "holes"),  # half a stage at the end of both, and tiles past the last row
    (3, 32, 32, 2, 1, "distinct"),  # the smallest sizes
    (70, 320, 192, 2, 1, "one expert"),  # an expert with all, the other with none; two token tiles of 64
]
MORE_CASES: list[Sizes] = [
    (13, 2816, 704, 1, 1, "distinct"),  # the model's sizes for one expert; 704 is five and a half groups of 128
    (1, 256, 128, 8, 8, "distinct"),
    (31, 256, 192, 8, 5, "repeated"),  # a token with one expert in several slots
    (5, 256, 128, 8, 4, "nothing"),
    (29, 128, 64, 1, 1, "distinct"),  # a token tile of 64, half of it
    (97, 128, 64, 2, 1, "holes"),  # three quarters
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_every_format_is_right(sizes: Sizes, format: Format) -> None:
    case = make_case(sizes, format)
    exact, low = case.exact()
    outputs = [run(case, seed) for seed in SEEDS]
    for output in outputs:
        assert_close(output, exact, torch.bfloat16, low)
        assert torch.equal(output, outputs[0])


@pytest.mark.parametrize("format", FIRST_FORMATS, ids=str)
@pytest.mark.parametrize("sizes", MORE_CASES, ids=str)
def test_more_sizes(sizes: Sizes, format: Format) -> None:
    case = make_case(sizes, format)
    assert_close(run(case, seed=4), case.exact()[0], torch.bfloat16, case.exact()[1])


def test_formats_may_differ_and_a_factor_may_be_missing() -> None:
    case = make_case(CASES[0], FORMATS[0], FORMATS[1])
    case.down.factors = None
    assert_close(run(case), case.exact()[0], torch.bfloat16, case.exact()[1])


def wrong_scales(case: Case) -> Case:
    """The scales of the next group."""
    assert case.gate_up.scales is not None
    scales = case.gate_up.scales.view(torch.uint8).roll(case.gate_up.scales.element_size(), -1)
    moved = Matrix(
        case.gate_up.format,
        case.gate_up.values,
        scales.view(case.gate_up.scales.dtype),
        case.gate_up.factors,
        case.gate_up.rows_per_factor,
    )
    return Case(case.input, case.expert_ids, case.expert_weights, moved, case.down)


def exchanged_factors(case: Case) -> Case:
    """Gate's factors for up and up's for gate."""
    experts = case.gate_up.values.shape[0]
    assert case.gate_up.factors is not None
    factors = case.gate_up.factors.view(experts, 2, -1).flip(1).flatten().contiguous()
    moved = Matrix(case.gate_up.format, case.gate_up.values, case.gate_up.scales, factors, case.gate_up.rows_per_factor)
    return Case(case.input, case.expert_ids, case.expert_weights, moved, case.down)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_bounds_notice_a_wrong_scale(format: Format) -> None:
    case = make_case(CASES[0], format)
    output, low = run(case), case.exact()[1]
    mistakes = [exchanged_factors(case)] + ([] if format.format == FP8 else [wrong_scales(case)])
    for mistake in mistakes:
        with pytest.raises(AssertionError, match=r"off by more than|wanted at most"):
            assert_close(output, mistake.exact()[0], torch.bfloat16, low)


@pytest.mark.parametrize("format", FIRST_FORMATS, ids=str)
def test_bits_of_a_token_do_not_depend_on_the_others(format: Format) -> None:
    case = make_case((75, 256, 128, 4, 2, "distinct"), format)
    together = run(case)
    for rows in ([3], list(range(20)), torch.randperm(75).tolist()):
        assert torch.equal(run(case.rows(rows), seed=2), together[rows])


@pytest.mark.parametrize(("capability", "format"), [(86, 1), (90, 0), (120, 1)])
def test_other_gpus_give_the_same_bits(capability: int, format: int) -> None:
    """Hopper too where a matrix is FP8; for 4 bits it has kernels of its own."""
    case = make_case(CASES[0], FORMATS[format])
    assert torch.equal(run(case, 1, capability), run(case, 1, 80))


# The dense projection, and through it single weights.


def run_dense(input: Tensor, weight: Matrix, seed: int = 1, capability: int = 80) -> Tensor:
    rows, out_features = input.shape[0], weight.values.shape[0]
    op, cuda = DenseQuantized(Dense(rows, input.shape[1], out_features, BFLOAT16), weight.describe()), Cuda()
    size = library().dgemma_cuda_dense_quantized_workspace(ctypes.byref(op))
    workspace = torch.full((size + GUARD,), 0xFF, dtype=torch.uint8)
    out = torch.full((rows * out_features + GUARD,), NAN, dtype=torch.bfloat16)
    op.dense.input, op.dense.output = input.data_ptr(), out.data_ptr()
    op.dense.workspace, op.dense.workspace_bytes = (workspace.data_ptr() if size else None), size
    library().sim_set_seed(ctypes.c_uint64(seed))
    with gpu(capability):
        status = library().dgemma_cuda_dense_quantized(ctypes.byref(op), ctypes.byref(cuda))
    assert status == OK, cuda.message.decode()
    assert bool((workspace[size:] == 0xFF).all()), "written behind the workspace"
    assert bool(out[rows * out_features :].isnan().all()), "written behind the output"
    return out[: rows * out_features].view(rows, out_features)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("sizes", [(5, 288, 72), (33, 1152, 136), (90, 640, 200)], ids=str)
def test_dense_is_right(sizes: tuple[int, int, int], format: Format) -> None:
    rows, in_features, out_features = sizes
    input = torch.randn(rows, in_features).bfloat16()
    weight = quantize(torch.randn(out_features, in_features) / in_features**0.5, format, out_features // 4)
    exact = dense_reference.dense(input, weight.exact())
    low = dense_reference.dense_rounded(input, weight.exact().bfloat16())
    for seed in SEEDS[: 3 if rows < 40 else 1]:
        assert_close(run_dense(input, weight, seed), exact, torch.bfloat16, low)


@pytest.mark.parametrize("format", FORMATS[:2], ids=str)
def test_dense_segments_in_turn_give_the_same_bits(format: Format) -> None:
    """So many rows that a unit takes all segments of its tile; each row as if it had come alone."""
    in_features, out_features = 768, 16
    input = torch.randn(132 * 128, in_features).bfloat16()
    weight = quantize(torch.randn(out_features, in_features), format, 8)
    together = run_dense(input, weight)
    chosen = torch.randperm(len(input))[:40]
    assert torch.equal(run_dense(input[chosen].contiguous(), weight, 2), together[chosen])


def unit_rows(columns: int) -> Tensor:
    """Inputs that pick one column each."""
    return torch.eye(columns, dtype=torch.bfloat16)


def test_every_e4m3_code_is_exact() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN
    factors = torch.tensor([1.0, 2**-20, 2**20, 3.0] * 4)
    weight = Matrix(FORMATS[0], codes.view(16, 16), None, factors)
    # Products with 3 have five bits.
    assert torch.equal(run_dense(unit_rows(16), weight).double(), weight.exact().T)
    weight.factors = None
    assert torch.equal(run_dense(unit_rows(16), weight).double(), weight.exact().T)


def test_every_e2m1_code_with_every_scale_is_exact() -> None:
    """Every scale of e4m3, subnormal and negative ones too, with all sixteen codes."""
    codes = torch.arange(16, dtype=torch.int32).repeat(64, 4)
    scales = torch.arange(256, dtype=torch.uint8)
    scales[[0x7F, 0xFF]] = 0  # NaN
    weight = Matrix(FORMATS[1], packed(codes), scales.view(torch.float8_e4m3fn).view(64, 4), None)
    assert torch.equal(run_dense(unit_rows(64), weight).double(), weight.exact().T)


@pytest.mark.parametrize("format", FORMATS[2:], ids=str)
def test_every_int4_code_is_rounded_once(format: Format) -> None:
    """With scales of all exponents that bfloat16 results have room for, and float16's extremes."""
    columns, rows = 256, 40
    codes = torch.arange(16, dtype=torch.int32).repeat(rows, columns // 16)
    codes = codes[:, torch.randperm(columns)]
    exponents = torch.linspace(-14, 15, rows) if format.scale_dtype == torch.float16 else torch.linspace(-90, 90, rows)
    scales = (1 + torch.rand(rows, columns // format.group)) * torch.exp2(exponents.round())[:, None]
    scales[:, ::2] *= -1
    scales = (
        scales.clamp(-65504, 65504).to(format.scale_dtype)
        if format.scale_dtype == torch.float16
        else scales.to(format.scale_dtype)
    )
    if format.scale_dtype == torch.float16:
        scales[0] = 2**-24  # the smallest subnormal
        scales[1] = 1023 * 2**-24  # the largest
    weight = Matrix(format, packed(codes), scales, None)
    # At most 15 bits, so the way through float is exact.
    assert torch.equal(run_dense(unit_rows(columns), weight), weight.exact().T.bfloat16())


def test_weights_and_scales_are_read_once() -> None:
    """By cp.async: the last kernel of a dense call without segments apart is the product."""
    rows, in_features, out_features = 20, 192, 136
    for format, bytes_of_row in [(FORMATS[0], 192), (FORMATS[1], 96 + 12), (FORMATS[2], 96 + 12)]:
        weight = quantize(torch.randn(out_features, in_features), format, 1)
        run_dense(torch.randn(rows, in_features).bfloat16(), weight)
        copied = ctypes.c_uint64()
        library().bytes_copied(ctypes.byref(copied))
        # Token rows once for each of two weight tiles.
        assert copied.value == out_features * bytes_of_row + 2 * rows * in_features * 2


# Plans and refusals.


def model_sizes(format: Format, tokens: int = 256) -> MoeFfnQuantized:
    matrix = Quantized(format.format, format.group, 2**20, 2**20, 1, None, 1)
    op = MoeFfnQuantized(MoeFfn(tokens, 2816, 704, 128, 8, BFLOAT16), matrix, matrix)
    for index, name in enumerate(
        ("input", "expert_ids", "expert_weights", "output", "workspace")
    ):  # far from each other
        setattr(op.ffn, name, (index + 1) << 30)
    return op


def plan_text(op: MoeFfnQuantized, capability: int = 90, multiprocessors: int = 132) -> str:
    text = ctypes.create_string_buffer(2000)
    problem = library().moe_quantized_plan(
        ctypes.byref(op), capability, multiprocessors, text, ctypes.c_size_t(len(text))
    )
    assert problem is None, problem
    return text.value.decode()


def test_plan_for_the_model_on_a_b200() -> None:
    assert plan_text(model_sizes(FORMATS[1]), 100, 148) == (
        "pass: 256 tokens\n"
        "gate_up: 592 blocks of 128 threads, 11 weight tiles of 128 rows per expert, 44 steps of 64, "
        "token tiles of 32, 4 stages of 9216 bytes\n"
        "down: 592 blocks of 128 threads, 22 weight tiles of 128 rows per expert, 11 steps of 64, "
        "token tiles of 32, 4 stages of 9216 bytes\n"
        "combine: 704 blocks of 128 threads\n"
        "workspace: 27665920 bytes\n"
    )


@pytest.mark.parametrize(
    ("format", "capability", "tokens", "blocks"),
    [(0, 80, 256, 3), (0, 89, 256, 2), (0, 120, 4096, 2), (0, 90, 4096, 2), (1, 80, 256, 4), (1, 86, 256, 2)],
)
def test_blocks_share_a_multiprocessor(format: int, capability: int, tokens: int, blocks: int) -> None:
    assert f"down: {100 * blocks} blocks" in plan_text(model_sizes(FORMATS[format], tokens), capability, 100)


BAD = [
    ("gate_up", "format", 9, "gate_up.format: got 9, wants FP8, INT4, NVFP4 or INT8"),
    ("gate_up", "group", 48, "gate_up.group: got 48, wants 32, 64 or 128 for INT4"),
    ("down", "scale_dtype", 0, "down.scale_dtype: got 0, wants bfloat16 or float16 for INT4"),
    ("ffn", "expert_size", 72, "expert_size: got 72, wants a multiple of 32 up to 16384 for the format of down"),
    (
        "ffn",
        "hidden_size",
        16400,
        "hidden_size: got 16400, wants a multiple of 32 up to 16384 for the format of gate_up",
    ),
    ("ffn", "dtype", 0, "dtype: wants bfloat16"),
]


@pytest.mark.parametrize(("part", "field", "value", "message"), BAD)
def test_sizes_and_formats_that_are_not_taken(part: str, field: str, value: int, message: str) -> None:
    op, cuda = model_sizes(FORMATS[2]), Cuda()
    setattr(getattr(op, part), field, value)
    assert library().dgemma_cuda_moe_ffn_quantized_workspace(ctypes.byref(op)) == 0
    assert library().dgemma_cuda_moe_ffn_quantized(ctypes.byref(op), ctypes.byref(cuda)) == UNSUPPORTED
    assert cuda.message.decode() == message


def test_rows_per_factor_must_divide() -> None:
    op, cuda = model_sizes(FORMATS[0]), Cuda()
    op.gate_up.factors, op.gate_up.rows_per_factor = 2**20, 1408
    assert library().dgemma_cuda_moe_ffn_quantized(ctypes.byref(op), ctypes.byref(cuda)) == UNSUPPORTED
    assert cuda.message.decode() == "gate_up.rows_per_factor: got 1408, wants a divisor of 704"


POINTERS = [("ffn", name) for name in ("input", "expert_ids", "expert_weights", "output", "workspace")]
POINTERS += [(part, name) for part in ("gate_up", "down") for name in ("values", "scales", "factors")]


@pytest.mark.parametrize("address", [None, 2**20 + 2], ids=["null", "odd"])
@pytest.mark.parametrize(("part", "name"), POINTERS)
def test_bad_pointers(part: str, name: str, address: int | None) -> None:
    op, cuda = model_sizes(FORMATS[1]), Cuda()
    setattr(getattr(op, part), name, address)
    if name == "factors" and address is None:
        return
    assert library().dgemma_cuda_moe_ffn_quantized(ctypes.byref(op), ctypes.byref(cuda)) == INVALID_ARGUMENT
    shown = name if part == "ffn" else f"{part}.{name}"
    assert re.fullmatch(rf"{shown}: got (NULL, wants .*|0x.*, wants a multiple of \d+ bytes)", cuda.message.decode())


def test_small_workspace() -> None:
    op, cuda = model_sizes(FORMATS[1]), Cuda()
    wanted = library().dgemma_cuda_moe_ffn_quantized_workspace(ctypes.byref(op))
    op.ffn.workspace_bytes = wanted - 1
    assert library().dgemma_cuda_moe_ffn_quantized(ctypes.byref(op), ctypes.byref(cuda)) == WORKSPACE_TOO_SMALL
    assert cuda.message.decode() == f"workspace_bytes: got {wanted - 1}, wants at least {wanted}"
