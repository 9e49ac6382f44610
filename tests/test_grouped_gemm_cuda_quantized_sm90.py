"""The CUDA kernels over 4-bit weights that are Hopper's own, run on the host by the test bed."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from torch import Tensor

from bounds import assert_close
from quantized_matrices import E2M1, FORMATS, FP8, INT4, NVFP4, Format
from sim.build import SUPPORTED
from test_grouped_gemm_cuda import even_ids, prefetches
from test_grouped_gemm_cuda_quantized import (
    CASES,
    MORE_CASES,
    SEEDS,
    Case,
    Sizes,
    describe,
    exchanged_factors,
    library,
    make_case,
    model_sizes,
    plan_text,
    run,
    wrong_scales,
)

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")

FOUR_BITS = [format for format in FORMATS if format.format != FP8]
# One of each decoder.
DECODERS = [
    next(format for format in FOUR_BITS if (format.format, format.scale_dtype) == kind)
    for kind in [(NVFP4, torch.float8_e4m3fn), (INT4, torch.bfloat16), (INT4, torch.float16)]
]
SIZES: list[Sizes] = [
    *MORE_CASES,
    (150, 224, 96, 1, 1, "distinct"),  # two token tiles of 128; rows of scales that begin within words
    (20, 96, 352, 2, 2, "distinct"),  # h ends within the first half of a block of 128 columns
    (20, 352, 224, 2, 2, "holes"),  # and within the second
    (40, 256, 128, 8, 1, "one expert"),  # a token tile of 32, full, and a quarter
    (23, 160, 96, 2, 1, "one expert"),  # three quarters
    (45, 160, 96, 2, 1, "one expert"),  # a token tile of 64, three quarters
]


def run_hopper(case: Case, seed: int = 1) -> Tensor:
    return run(case, seed, 90)


@pytest.mark.parametrize("format", FOUR_BITS, ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_every_format_is_right(sizes: Sizes, format: Format) -> None:
    case = make_case(sizes, format)
    exact, low = case.exact()
    outputs = [run_hopper(case, seed) for seed in SEEDS]
    for output in outputs:
        assert_close(output, exact, torch.bfloat16, low)
        assert torch.equal(output, outputs[0])


@pytest.mark.parametrize("format", [*DECODERS, FOUR_BITS[-1], Format(INT4, 64, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_more_sizes(sizes: Sizes, format: Format) -> None:
    case = make_case(sizes, format)
    assert_close(run_hopper(case, seed=4), case.exact()[0], torch.bfloat16, case.exact()[1])


def test_formats_may_differ_and_a_factor_may_be_missing() -> None:
    for gate_up, down in [(DECODERS[0], DECODERS[2]), (DECODERS[1], DECODERS[0])]:
        case = make_case(CASES[0], gate_up, down)
        case.down.factors = None
        assert_close(run_hopper(case), case.exact()[0], torch.bfloat16, case.exact()[1])


def test_with_fp8_in_one_matrix_the_kernels_for_all_gpus_run() -> None:
    case = make_case(CASES[0], FORMATS[0], DECODERS[0])
    assert torch.equal(run_hopper(case), run(case, 1, 80))


@pytest.mark.parametrize("format", FOUR_BITS, ids=str)
def test_the_bounds_notice_a_wrong_scale(format: Format) -> None:
    case = make_case(CASES[0], format)
    output, low = run_hopper(case), case.exact()[1]
    for mistake in (exchanged_factors(case), wrong_scales(case)):
        with pytest.raises(AssertionError, match=r"off by more than|wanted at most"):
            assert_close(output, mistake.exact()[0], torch.bfloat16, low)


@pytest.mark.parametrize("format", DECODERS, ids=str)
def test_bits_of_a_token_do_not_depend_on_the_others(format: Format) -> None:
    case = make_case((75, 256, 128, 4, 2, "distinct"), format)
    together = run_hopper(case)
    for rows in ([3], list(range(20)), torch.randperm(75).tolist()):
        assert torch.equal(run_hopper(case.rows(rows), seed=2), together[rows])


def decode(format: Format, word: int, scales: tuple[int, int]) -> Tensor:
    """A word's eight weights by row and by group of scales, by column."""
    groups = 2 if format.format == NVFP4 else 1
    out = torch.full((2, groups, 8), float("nan"))
    matrix = describe(make_case(CASES[2], format)).gate_up
    library().decode_sm90(
        ctypes.byref(matrix), ctypes.c_uint32(word), *map(ctypes.c_uint32, scales), ctypes.c_void_p(out.data_ptr())
    )
    return out.double()


WORDS = [0x76543210, 0xFEDCBA98, 0x0123_4567, 0x89AB_CDEF, 0x5A0F_87E1]


def codes_of(word: int) -> Tensor:
    return torch.tensor([word >> 4 * i & 15 for i in range(8)])


def test_every_e2m1_code_with_every_scale_is_exact() -> None:
    bits = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    scales = bits.view(torch.float8_e4m3fn).double()
    for word in WORDS:
        for i in range(0, len(bits) - 3, 4):
            a, b, c, d = (int(x) for x in bits[i : i + 4])
            wanted = scales[i : i + 4].view(2, 2, 1) * E2M1[codes_of(word)]
            assert torch.equal(decode(DECODERS[0], word, (a | b << 8, c | d << 8)), wanted)


@pytest.mark.parametrize("format", DECODERS[1:], ids=str)
def test_every_int4_code_is_rounded_once(format: Format) -> None:
    """With scales of all exponents that are taken, and float16's extremes."""
    lowest, highest = (-14, 15) if format.scale_dtype == torch.float16 else (-93, 27)
    scales = (1 + torch.rand(200)) * torch.exp2(torch.linspace(lowest, highest, 200).round())
    scales[::3] *= -1
    if format.scale_dtype == torch.float16:
        scales = scales.clamp(-65504, 65504)
        scales[:2] = torch.tensor([2**-24, 1023 * 2**-24])  # the smallest subnormal and the largest
    else:
        scales[-1] = 255 * 2.0**20  # the largest that is taken
    scales = scales.to(format.scale_dtype)
    bits = (scales.view(torch.int16).int() & 0xFFFF).tolist()
    for word in WORDS:
        for i in range(0, 200, 2):
            # At most 15 bits, so the way through float is exact.
            wanted = (scales[i : i + 2].double().view(2, 1, 1) * (codes_of(word) - 8)).float().bfloat16()
            assert torch.equal(decode(format, word, (bits[i], bits[i + 1])), wanted.double())


def test_plan_for_the_model_on_an_h200() -> None:
    assert plan_text(model_sizes(DECODERS[0])) == (
        "pass: 256 tokens\n"
        "gate_up: 132 blocks of 384 threads, 11 weight tiles of 128 rows per expert, 22 steps of 128, "
        "token tiles of 32, 6 stages of 36864 bytes\n"
        "down: 132 blocks of 384 threads, 22 weight tiles of 128 rows per expert, 6 steps of 128, "
        "token tiles of 32, 6 stages of 36864 bytes\n"
        "order: contiguous runs, 12 steps of weights asked for early\n"
        "combine: 704 blocks of 128 threads\n"
        "workspace: 27665920 bytes\n"
    )


def test_large_calls_take_the_larger_token_tile() -> None:
    text = plan_text(model_sizes(DECODERS[0], 4096))
    assert text.count("token tiles of 128, 4 stages of 43008 bytes") == 2
    assert plan_text(model_sizes(DECODERS[0], 512)).count("token tiles of 64, 4 stages of 53248 bytes") == 2
    assert plan_text(model_sizes(DECODERS[0], 257)).count("token tiles of 64,") == 2
    assert "order: every blocks-th work tile, 0 steps" in text
    assert "order: contiguous runs, 0 steps" in plan_text(model_sizes(DECODERS[0], 1))


def test_every_token_tile_is_run() -> None:
    texts = [tiles_of(sizes) for sizes in [*CASES, *SIZES]]
    assert set().union(*texts) == {"32", "64", "128"}


def tiles_of(sizes: Sizes) -> list[str]:
    return re.findall(r"token tiles of (\d+),", plan_text(describe(make_case(sizes, DECODERS[0])), 90, 3))


@pytest.mark.parametrize("format", DECODERS, ids=str)
def test_the_likely_weights_are_fetched_early(format: Format) -> None:
    """Each box that the L2 is asked for is one that the block loads."""
    case = make_case((20, 256, 192, 5, 2, "distinct"), format)
    case.expert_ids = even_ids(20, 5, 2)
    prefetches(library())
    assert_close(run_hopper(case), case.exact()[0], torch.bfloat16, case.exact()[1])
    asked, loaded = prefetches(library())
    # Two boxes a step. Three blocks; 5 experts by 3 weight tiles of 2 steps of gate and up, by 2 of 2 of down.
    assert asked == loaded == 2 * (3 * 10 + 8 + 6 + 6)


def test_the_workspace_is_the_same_for_every_gpu() -> None:
    for format in FORMATS[:3]:
        op = model_sizes(format)
        lines = {plan_text(op, capability).splitlines()[-1] for capability in (80, 90, 120)}
        size = library().dgemma_cuda_moe_ffn_quantized_workspace(ctypes.byref(op))
        assert lines == {f"workspace: {size} bytes"}
