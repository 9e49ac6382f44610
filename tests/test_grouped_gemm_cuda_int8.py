"""The CUDA kernels with weights and activations in INT8, run on the host by the test bed."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backend import cpu_only
from bounds import assert_close
from dgemma_ext.ops import quantized_gemm
from dgemma_ext.ops.formats import Int8Weight
from quantized_matrices import FORMATS, INT8, Format, Matrix, quantize
from sim.build import SUPPORTED
from sparse_memory import sparse
from test_grouped_gemm_cuda import Cuda
from test_grouped_gemm_cuda_fp8 import rounded_activations
from test_grouped_gemm_cuda_quantized import (
    CASES,
    MORE_CASES,
    SEEDS,
    UNSUPPORTED,
    Case,
    Sizes,
    exchanged_factors,
    library,
    make_case,
    model_sizes,
    plan_text,
    run,
    run_dense,
)

pytestmark = [cpu_only, pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")]

INTS = Format(INT8)
SIZES: list[Sizes] = [
    *CASES,
    *MORE_CASES,
    (37, 80, 48, 3, 2, "distinct"),  # rows of which a stage is a quarter more, or three quarters of one
    (150, 128, 64, 1, 1, "distinct"),  # three token tiles of 64
]


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in int8 and what they are to be multiplied by, in fp32 as the kernel does it."""
    largest = x.float().abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # 127 / largest would multiply by a reciprocal
    return (x.float() * torch.where(inverse.isfinite(), inverse, 0.0)).round().to(torch.int8), largest / 127


def make(sizes: Sizes) -> Case:
    """Tokens and weight rows of very different sizes: a scale is no other's."""
    case = make_case(sizes, INTS)
    case.input *= torch.exp2(torch.linspace(-3, 3, len(case.input)).round())[:, None].bfloat16()
    experts, rows, columns = case.gate_up.values.shape
    gate_up = torch.randn(experts, rows, columns) / columns**0.5 * torch.linspace(0.5, 2, rows)[:, None]
    down = torch.randn(experts, columns, rows // 2) / (rows // 2) ** 0.5 * torch.linspace(2, 0.5, columns)[:, None]
    missed = case.gate_up.factors.isnan().view(experts, -1).any(1)  # type: ignore[union-attr]
    case.gate_up, case.down = quantize(gate_up, INTS, 1), quantize(down, INTS, 1)
    for matrix in (case.gate_up, case.down):
        assert matrix.factors is not None
        matrix.factors.view(experts, -1)[missed] = float("nan")
    return case


def check(output: Tensor, case: Case) -> None:
    """By the bounds of every kernel, beside float64 over the same integers."""
    wanted, low = (rounded_activations(case, dtype, rounded_rows) for dtype in (torch.float64, torch.bfloat16))
    assert_close(output, wanted, torch.bfloat16, low)
    # Every token by itself: they differ in size.
    for row, wanted_row, low_row in zip(output, wanted, low, strict=True):
        assert_close(row, wanted_row, torch.bfloat16, low_row)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_int8_is_right(sizes: Sizes) -> None:
    case = make(sizes)
    outputs = [run(case, seed) for seed in (SEEDS if sizes[1] < 1000 else SEEDS[:1])]
    for output in outputs:
        check(output, case)
        assert torch.equal(output, outputs[0])


def test_the_bounds_notice_a_wrong_scale() -> None:
    case = make(CASES[0])
    output = run(case)
    off = case.input.clone()
    off[3] *= 1.05
    assert case.down.factors is not None
    next_row = replace(case.down, factors=case.down.factors.roll(1))
    for mistake in (exchanged_factors(case), replace(case, input=off), replace(case, down=next_row)):
        with pytest.raises(AssertionError, match=r"off by more than|wanted at most"):
            check(output, mistake)


def for_the_cpu(matrix: Matrix) -> Int8Weight:
    assert matrix.factors is not None
    scales = matrix.factors.repeat_interleave(matrix.rows_per_factor).view(matrix.values.shape[:-1])
    return Int8Weight(matrix.values.contiguous(), scales.contiguous())


@pytest.mark.parametrize(
    "sizes", [CASES[0], CASES[1], CASES[3], MORE_CASES[2], (37, 80, 48, 3, 2, "distinct")], ids=str
)
def test_experts_have_the_bits_of_the_cpu(sizes: Sizes) -> None:
    """Where gelu_tanh(x) is x, as of large x, and weights are powers of two: all other steps are the same numbers."""
    case = make(sizes)
    case.input = case.input.abs()
    experts, rows, _ = case.gate_up.values.shape
    gates = case.gate_up.values.view(torch.int8)[:, : rows // 2]
    gates.copy_(gates.abs().clamp(min=1))
    case.gate_up.factors = torch.linspace(1.1, 1.9, experts * rows)
    case.expert_weights = torch.exp2(torch.randint(-3, 3, case.expert_weights.shape).float())
    case.input[(case.expert_ids < 0).all(1)] = 0  # the CPU looks at every token
    call = case.input, case.expert_ids, case.expert_weights
    down = for_the_cpu(replace(case.down, factors=case.down.factors.nan_to_num(1.0)))  # type: ignore[union-attr]
    wanted = quantized_gemm.moe_ffn(*call, for_the_cpu(case.gate_up), down)
    assert torch.equal(run(case), wanted)
    assert bool((wanted[(case.expert_ids >= 0).any(1)] != 0).any())


def test_formats_may_differ() -> None:
    """Tokens of the one product are rounded, those of the other are not."""
    for first, second in ((INTS, FORMATS[0]), (FORMATS[1], INTS), (INTS, FORMATS[4])):
        case = make_case(CASES[0], first, second)
        exact, low = (mixed(case, dtype) for dtype in (torch.float64, torch.bfloat16))
        assert_close(run(case), exact, torch.bfloat16, low)


def mixed(case: Case, dtype: torch.dtype) -> Tensor:
    gate_up, down = case.gate_up.exact().to(dtype), case.down.exact().to(dtype)

    def tokens(x: Tensor, matrix: Matrix) -> Tensor:
        if matrix.format != INTS:
            return x.to(dtype)
        codes, scales = rounded_rows(x)
        return (codes.double() * scales.double()).to(dtype)

    result = torch.zeros(case.input.shape, dtype=torch.float64)
    for e in range(len(down)):
        token, slot = torch.where(case.expert_ids == e)
        gate, up = (tokens(case.input[token], case.gate_up) @ gate_up[e].T).split(down.shape[2], dim=-1)
        h = (torch.nn.functional.gelu(gate, approximate="tanh") * up).bfloat16()
        y = (tokens(h, case.down) @ down[e].T).double()
        result.index_add_(0, token, y * case.expert_weights[token, slot, None].double())
    return result


def test_bits_of_a_token_do_not_depend_on_the_others() -> None:
    case = make((75, 256, 128, 4, 2, "distinct"))
    together = run(case)
    for rows in ([3], list(range(20)), torch.randperm(75).tolist()):
        assert torch.equal(run(case.rows(rows), seed=2), together[rows])


@pytest.mark.parametrize("capability", [86, 89, 90, 100, 120])
def test_other_gpus_give_the_same_bits(capability: int) -> None:
    case = make(CASES[0])
    assert torch.equal(run(case, 1, capability), run(case, 1, 80))


@pytest.mark.parametrize(
    ("format", "name", "capability"),
    [(INTS, "moe_ffn_quantized", 80), (FORMATS[0], "moe_ffn_quantized", 80)]
    + [(FORMATS[0], "moe_ffn_fp8", capability) for capability in (89, 90)],
    ids=str,
)
def test_the_last_of_many_experts(format: Format, name: str, capability: int) -> None:
    """Its weights begin 3.2 GB behind the first one's, beyond offsets of 32 bits."""
    experts = 1024
    near = make_case((3, 16384, 96, 1, 1, "distinct"), format)
    far = replace(near, expert_ids=torch.full_like(near.expert_ids, experts - 1))
    for which in ("gate_up", "down"):
        matrix = getattr(near, which)
        values = sparse(experts * matrix.values.numel(), torch.uint8).view(experts, *matrix.values.shape[1:])
        values[-1] = matrix.values.view(torch.uint8)[0]
        factors = torch.full((experts, matrix.factors.numel()), float("nan"))
        factors[-1] = matrix.factors
        setattr(far, which, replace(matrix, values=values, factors=factors.flatten()))
    assert torch.equal(run(far, 1, capability, name), run(near, 1, capability, name))


# The dense projection: sums of integers have one result, so every bit is compared.


def exact_dense(input: Tensor, weight: Matrix) -> Tensor:
    codes, scales = rounded_rows(input)
    sums = (codes.double() @ weight.values.view(torch.int8).double().T).float()
    product = sums * scales
    if weight.factors is not None:
        product = product * weight.factors.repeat_interleave(weight.rows_per_factor)
    return product.bfloat16()


@pytest.mark.parametrize("sizes", [(1, 16, 8), (5, 288, 72), (33, 1152, 136), (90, 640, 200), (64, 2816, 264)], ids=str)
def test_dense_has_the_bits_of_exact_sums_and_of_the_cpu(sizes: tuple[int, int, int]) -> None:
    """Segments apart where rows are few, and factors of a row and of several."""
    rows, in_features, out_features = sizes
    input = (torch.randn(rows, in_features) * torch.logspace(-3, 3, rows)[:, None]).bfloat16()
    input[0] = 0
    magnitudes = torch.linspace(0.5, 2, out_features)[:, None]
    for rows_per_factor in (1, out_features // 4):
        weight = quantize(torch.randn(out_features, in_features) * magnitudes, INTS, rows_per_factor)
        wanted = exact_dense(input, weight)
        assert torch.equal(quantized_gemm.dense(input, for_the_cpu(weight)), wanted)
        for seed in SEEDS[: 3 if rows < 40 else 1]:
            assert torch.equal(run_dense(input, weight, seed), wanted)
    weight.factors = None
    assert torch.equal(run_dense(input, weight), exact_dense(input, weight))


def test_dense_segments_in_turn_give_the_same_bits() -> None:
    """So many rows that a unit takes all segments of its tile; each row as if it had come alone."""
    input = torch.randn(132 * 128, 512).bfloat16()
    weight = quantize(torch.randn(16, 512), INTS, 1)
    together = run_dense(input, weight)
    assert torch.equal(together, exact_dense(input, weight))
    chosen = torch.randperm(len(input))[:40]
    assert torch.equal(run_dense(input[chosen].contiguous(), weight, 2), together[chosen])


def test_every_code_is_signed() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).view(16, 16)
    weight = Matrix(INTS, codes.view(torch.uint8), None, None)
    for sign in (1, -1):
        # 127 at one column, whose scale is 1.
        got = run_dense((127.0 * sign * torch.eye(16)).bfloat16(), weight)
        assert torch.equal(got, (127.0 * sign * codes.float().T).bfloat16())


@pytest.mark.parametrize("extreme", [-128, 127])
def test_the_largest_sums(extreme: int) -> None:
    values = torch.full((8, 16384), extreme, dtype=torch.int8).view(torch.uint8)
    for sign in (1.0, -1.0):
        got = run_dense(torch.full((3, 16384), sign).bfloat16(), Matrix(INTS, values, None, None))
        wanted = torch.tensor(sign * extreme * 127 * 16384, dtype=torch.float32) * torch.tensor(1 / 127)
        assert torch.equal(got, wanted.bfloat16().expand(3, 8))


def test_sums_of_segments_are_not_rounded_on_the_way() -> None:
    """Segments of more than 2^24, which fp32 would round, and that cancel but for little."""
    half, input = torch.randint(64, 128, (8, 8192)), torch.randint(64, 128, (3, 8192))
    values = torch.cat([half, -half], -1)
    values[:, -50:] += torch.randint(-3, 4, (8, 50))
    weight = Matrix(INTS, values.clamp(-128, 127).to(torch.int8).view(torch.uint8), None, None)
    input[:, 0] = 127
    rows = torch.cat([input, input], -1).bfloat16()
    assert torch.equal(run_dense(rows, weight), exact_dense(rows, weight))


# Rounding.


def test_rows_are_rounded_to_int8() -> None:
    """Ties both ways, signed zeros, every exponent, rows of zeros and of subnormal numbers, and rows left alone."""
    width = 528
    rows = torch.zeros(8, width)
    rows[0, :511], rows[0, 511] = torch.arange(-255, 256) / 2, 127.0  # steps of a half
    rows[1] = torch.randn(width)
    rows[2] = torch.randn(width) * torch.exp2(torch.linspace(-20, 8, width))
    rows[3, ::2] = -0.0
    rows[4] = torch.randn(width) * 2.0**-125  # 127 / its largest is infinite
    rows[5], rows[5, 17] = torch.randn(width) * 2.0**-129, -(2.0**-121)  # of which 127 / 2^-121 is not
    rows[6] = torch.randn(width) * 2.0**120
    rows = rows.bfloat16()
    out, scales = torch.full((8 * width + 16,), 0x55, dtype=torch.uint8), torch.full((9,), float("nan"))
    filled = torch.tensor([7], dtype=torch.int32)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (rows, out, scales)]
    assert library().quantize_rows_int8(*pointers, 8, width, ctypes.c_void_p(filled.data_ptr())) is None
    codes, wanted = rounded_rows(rows)
    assert torch.equal(out[: 7 * width].view(7, width), codes[:7].view(torch.uint8))
    assert torch.equal(scales[:7], wanted[:7].flatten())
    assert codes[4].abs().max() == 0
    assert codes[5].abs().max() == 127
    assert bool((out[7 * width :] == 0x55).all())
    assert bool(scales[7:].isnan().all())


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_no_number_makes_its_row_none(value: float) -> None:
    input, weight = torch.randn(3, 64).bfloat16(), quantize(torch.randn(16, 64), INTS, 1)
    input[1, 40] = value
    got = run_dense(input, weight)
    assert bool(got[1].isnan().all())
    assert torch.equal(got[[0, 2]], exact_dense(input[[0, 2]], weight))


# Plans and refusals.


def test_plan_for_the_model_on_an_a100() -> None:
    assert plan_text(model_sizes(INTS), 80, 108) == (
        "pass: 256 tokens\n"
        "gate_up: 432 blocks of 128 threads, 11 weight tiles of 128 rows per expert, 44 steps of 64, "
        "token tiles of 32, 4 stages of 10240 bytes\n"
        "down: 432 blocks of 128 threads, 22 weight tiles of 128 rows per expert, 11 steps of 64, "
        "token tiles of 32, 4 stages of 10240 bytes\n"
        "input to int8: 64 blocks of 128 threads\n"
        "activations to int8: 512 blocks of 128 threads\n"
        "combine: 704 blocks of 128 threads\n"
        "workspace: 28133888 bytes\n"
    )


@pytest.mark.parametrize(
    ("capability", "tokens", "blocks"), [(80, 256, 4), (86, 256, 2), (90, 256, 4), (90, 4096, 3), (120, 4096, 2)]
)
def test_blocks_share_a_multiprocessor(capability: int, tokens: int, blocks: int) -> None:
    assert f"down: {100 * blocks} blocks" in plan_text(model_sizes(INTS, tokens), capability, 100)


def test_tokens_are_rounded_where_a_matrix_is_int8() -> None:
    op = model_sizes(INTS)
    op.down.format = FORMATS[0].format
    plan = plan_text(op, 80, 108)
    assert "input to int8" in plan
    assert "activations to int8" not in plan
    op.down.format, op.gate_up.format = INT8, FORMATS[0].format
    plan = plan_text(op, 80, 108)
    assert "input to int8" not in plan
    assert "activations to int8" in plan


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("down", "group", 32, "down.group: got 32, wants 0 for INT8"),
        ("ffn", "expert_size", 72, "expert_size: got 72, wants a multiple of 16 up to 16384 for the format of down"),
        ("down", "rows_per_factor", 3, "down.rows_per_factor: got 3, wants a divisor of 2816"),
    ],
)
def test_what_is_not_taken(part: str, field: str, value: int, message: str) -> None:
    op, cuda = model_sizes(INTS), Cuda()
    op.down.factors = 2**20
    setattr(getattr(op, part), field, value)
    assert library().dgemma_cuda_moe_ffn_quantized_workspace(ctypes.byref(op)) == 0
    assert library().dgemma_cuda_moe_ffn_quantized(ctypes.byref(op), ctypes.byref(cuda)) == UNSUPPORTED
    assert cuda.message.decode() == message
