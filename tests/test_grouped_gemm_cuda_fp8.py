"""The CUDA kernels with weights and activations in FP8, run on the host by the test bed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bounds import element_bound, relative_distance
from quantized_matrices import FORMATS, Matrix
from reference import grouped_gemm as reference
from sim.build import SUPPORTED
from test_grouped_gemm_cuda import Cuda, even_ids, prefetches
from test_grouped_gemm_cuda_quantized import (
    CASES,
    MORE_CASES,
    SEEDS,
    UNSUPPORTED,
    Case,
    Sizes,
    describe,
    exchanged_factors,
    gpu,
    library,
    make_case,
    model_sizes,
    run,
)

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")

FP8 = FORMATS[0]
# wgmma's GPU, and one of mma.sync's.
PATHS = [90, 89]
# Relative distances of a result. From that with activations as they are: x and h are rounded in turn to four bits,
# which by itself makes up to 1.3e-3 in float64. From that with the same roundings, of a token and of all: an h that
# differs in its last bits may become the next code, which makes 2e-4 at most, of the smallest sizes.
BOUND, ROW_BOUND_OF_ROUNDED, BOUND_OF_ROUNDED = 2e-3, 3e-3, 3e-4


def make(sizes: Sizes) -> Case:
    """Tokens of very different sizes: a token's scale is no other's."""
    case = make_case(sizes, FP8)
    case.input *= torch.exp2(torch.linspace(-3, 3, len(case.input)).round())[:, None].bfloat16()
    return case


def run_fp8(case: Case, seed: int = 1, capability: int = 90) -> Tensor:
    return run(case, seed, capability, "moe_ffn_fp8")


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3 and what they are to be multiplied by, from bfloat16; in fp32 as the kernel does it."""
    largest = x.float().abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 448) / largest  # 448 / largest would multiply by a reciprocal
    codes = (x.float() * torch.where(largest > 0, inverse, 0.0)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, largest / 448


Rounded = Callable[[Tensor], tuple[Tensor, Tensor]]


def rounded_activations(case: Case, dtype: torch.dtype, rounded_rows: Rounded = rounded_rows) -> Tensor:
    """The call with rounded activations, all other steps in `dtype`, h rounded to bfloat16."""
    gate_up, down = case.gate_up.exact().to(dtype), case.down.exact().to(dtype)
    expert_size = down.shape[2]
    result = torch.zeros(case.input.shape, dtype=torch.float64)
    codes, scales = rounded_rows(case.input)
    x = (codes.double() * scales.double()).to(dtype)
    for e in range(len(down)):
        token, slot = torch.where(case.expert_ids == e)
        if len(token) == 0:
            continue
        gate, up = torch.nn.functional.linear(x[token], gate_up[e]).split(expert_size, dim=-1)
        h, h_scales = rounded_rows((torch.nn.functional.gelu(gate, approximate="tanh") * up).bfloat16())
        y = torch.nn.functional.linear((h.double() * h_scales.double()).to(dtype), down[e]).double()
        result.index_add_(0, token, y * case.expert_weights[token, slot, None].double())
    return result


@pytest.mark.parametrize("capability", PATHS)
@pytest.mark.parametrize("sizes", [*CASES, *MORE_CASES, (150, 128, 64, 1, 1, "distinct")], ids=str)
def test_fp8_is_right(sizes: Sizes, capability: int) -> None:
    case = make(sizes)
    exact = torch.from_numpy(reference.moe_ffn(case.input, case.expert_ids, case.expert_weights, *weights_of(case)))
    outputs = [run_fp8(case, seed, capability) for seed in (SEEDS if sizes[1] < 1000 else SEEDS[:1])]
    for output in outputs:
        assert relative_distance(output.double(), exact) <= BOUND
        assert_close_to_rounded(output, case)
        assert torch.equal(output, outputs[0])


def weights_of(case: Case) -> tuple[Tensor, Tensor]:
    return case.gate_up.exact(), case.down.exact()


def assert_close_to_rounded(output: Tensor, case: Case) -> None:
    wanted, low = rounded_activations(case, torch.float64), rounded_activations(case, torch.bfloat16)
    assert float((output.double() - wanted).abs().max()) <= element_bound(wanted, torch.bfloat16, low)
    # Every token by itself: they differ in size.
    for row, wanted_row in zip(output.double(), wanted, strict=True):
        assert relative_distance(row, wanted_row) <= ROW_BOUND_OF_ROUNDED
    assert relative_distance(output.double(), wanted) <= BOUND_OF_ROUNDED


@pytest.mark.parametrize("capability", PATHS)
def test_the_bounds_notice_a_wrong_scale(capability: int) -> None:
    case = make(CASES[0])
    output = run_fp8(case, capability=capability)
    # Weights' factors, and a token with a scale that is a twentieth off.
    off = case.input.clone()
    off[3] *= 1.05
    for mistake in (
        exchanged_factors(case),
        Case(off, case.expert_ids, case.expert_weights, case.gate_up, case.down),
    ):
        with pytest.raises(AssertionError):
            assert_close_to_rounded(output, mistake)


@pytest.mark.parametrize("capability", PATHS)
def test_sums_do_not_stay_in_the_tensor_core(capability: int) -> None:
    """It keeps 14 bits of a sum (the test bed cuts off the rest): long sums of one sign would all come out smaller."""
    case = make((2, 2816, 704, 1, 1, "distinct"))
    case.input = case.input.abs()
    for matrix in (case.gate_up, case.down):
        matrix.values &= 0x7F
    wanted = rounded_activations(case, torch.float64)
    output = run_fp8(case, capability=capability)
    assert abs(float(output.double().sum() / wanted.sum()) - 1) < 1e-3


@pytest.mark.parametrize("capability", [90, 120])
def test_bits_of_a_token_do_not_depend_on_the_others(capability: int) -> None:
    case = make((75, 256, 128, 4, 2, "distinct"))
    together = run_fp8(case, 1, capability)
    for rows in ([3], list(range(20)), torch.randperm(75).tolist()):
        assert torch.equal(run_fp8(case.rows(rows), 2, capability), together[rows])


def test_the_likely_weights_are_fetched_early() -> None:
    case = make((20, 256, 192, 5, 2, "distinct"))
    case.expert_ids = even_ids(20, 5, 2)
    prefetches(library())
    assert_close_to_rounded(run_fp8(case), case)
    # Three blocks; of gate and up 5 experts by 3 weight tiles of 2 steps, of down by 2 of 2, seven tiles to one block.
    assert prefetches(library()) == (3 * 9 + 8 + 6 + 6, 3 * 9 + 8 + 6 + 6)


def test_rows_are_rounded_to_e4m3() -> None:
    """Every exponent that a row's values may have beside its largest, ties, signed zeros, a row of zeros."""
    width = 2048
    ties = torch.arange(0, 449).float() / 16  # steps finer than e4m3's, so that some are ties
    rows = torch.zeros(5, width)
    rows[0, : len(ties)], rows[0, 1000] = ties, 448
    rows[1] = torch.randn(width)
    rows[2] = torch.randn(width) * torch.exp2(torch.linspace(-20, 8, width))
    rows[3, ::2] = -rows[0, ::2]
    rows[3, 7] = -448 * 2**-9
    rows = rows.bfloat16()
    out, scales = torch.full((5, width + 16), 0x55, dtype=torch.uint8), torch.full((6,), float("nan"))
    out = out.flatten()
    assert library().quantize_rows(*(ctypes.c_void_p(x.data_ptr()) for x in (rows, out, scales)), 5, width) is None
    codes, wanted = rounded_rows(rows)
    assert torch.equal(out[: 5 * width].view(5, width), codes.view(torch.uint8))
    assert torch.equal(scales[:5], wanted.flatten())
    assert bool((out[5 * width :] == 0x55).all())
    assert bool(scales[5].isnan())


def plan_text(capability: int, multiprocessors: int, tokens: int = 256) -> str:
    text = ctypes.create_string_buffer(2000)
    op = model_sizes(FP8, tokens)
    size = ctypes.c_size_t(len(text))
    assert library().moe_fp8_plan(ctypes.byref(op), capability, multiprocessors, text, size) is None
    return text.value.decode()


def test_plan_for_the_model_on_an_h200() -> None:
    assert plan_text(90, 132) == (
        "pass: 256 tokens\n"
        "gate_up: 132 blocks of 384 threads, 11 weight tiles of 128 rows per expert, 22 steps of 128, "
        "token tiles of 64, 9 stages of 24576 bytes\n"
        "down: 132 blocks of 384 threads, 22 weight tiles of 128 rows per expert, 6 steps of 128, "
        "token tiles of 64, 9 stages of 24576 bytes\n"
        "order: contiguous runs, 9 steps of weights asked for early\n"
        "input to e4m3: 64 blocks of 128 threads\n"
        "activations to e4m3: 512 blocks of 128 threads\n"
        "combine: 704 blocks of 128 threads\n"
        "workspace: 28133888 bytes\n"
    )


def test_plan_for_the_model_on_an_rtx_5090() -> None:
    assert plan_text(120, 170) == (
        "pass: 256 tokens\n"
        "gate_up: 340 blocks of 128 threads, 11 weight tiles of 128 rows per expert, 44 steps of 64, "
        "token tiles of 32, 4 stages of 10240 bytes\n"
        "down: 340 blocks of 128 threads, 22 weight tiles of 128 rows per expert, 11 steps of 64, "
        "token tiles of 32, 4 stages of 10240 bytes\n"
        "input to e4m3: 64 blocks of 128 threads\n"
        "activations to e4m3: 512 blocks of 128 threads\n"
        "combine: 704 blocks of 128 threads\n"
        "workspace: 28133888 bytes\n"
    )
    large = plan_text(89, 128, 4096)
    assert "gate_up: 256 blocks" in large
    assert "token tiles of 64, 3 stages of 12288 bytes" in large


@pytest.mark.parametrize("capability", [80, 86, 100])
def test_other_gpus_are_refused(capability: int) -> None:
    op, cuda = model_sizes(FP8), Cuda()
    with gpu(capability):
        assert library().dgemma_cuda_moe_ffn_fp8(ctypes.byref(op), ctypes.byref(cuda)) == UNSUPPORTED
    assert cuda.message.decode() == (
        f"this GPU has compute capability {capability // 10}.{capability % 10}, "
        "wants 8.9, 9.0 or 12.x and a build for it (9.0 as 90a)"
    )


def test_other_formats_are_refused() -> None:
    case = make_case(CASES[0], FP8, FORMATS[1])
    op, cuda = describe(case), Cuda()
    assert isinstance(case.down, Matrix)
    assert library().dgemma_cuda_moe_ffn_fp8_workspace(ctypes.byref(op)) == 0
    assert library().dgemma_cuda_moe_ffn_fp8(ctypes.byref(op), ctypes.byref(cuda)) == UNSUPPORTED
    assert cuda.message.decode() == "down.format: got 3, wants FP8"
