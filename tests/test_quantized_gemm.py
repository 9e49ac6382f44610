"""The experts and the dense projection over quantized weights, on every instruction set, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, library

from backend import BACKEND, DTYPES, cpu_only
from bounds import assert_close
from dgemma_ext.ops import quantized_gemm, weights
from dgemma_ext.ops.formats import Fp8Weight, Int4Weight, Nvfp4Weight, QuantizedWeight
from dgemma_ext.ops.plain import quantized_gemm as quantized_gemm_plain
from reference import dense as dense_reference
from reference import grouped_gemm as reference
from test_grouped_gemm import route

NAN_CODE = 0x7F  # as in e4m3
KINDS = ["fp8", "int4-32", "int4-64", "int4-128", "int4-float16", "nvfp4", "nvfp4-modelopt"]


def quantized(kind: str, weight: Tensor, runs: int = 1) -> QuantizedWeight:
    """`weight` [..., rows, columns] in a format; nvfp4 with a scale for each of `runs` equal runs of rows."""
    if kind == "fp8":
        return Fp8Weight.quantize(weight)
    if kind.startswith("int4"):
        made = Int4Weight.quantize(weight, 32 if kind.endswith("float16") else int(kind[5:]))
        # Scales that are not bfloat16 values.
        return replace(made, scales=(made.scales.float() * 1.0007).half()) if kind.endswith("float16") else made
    made_nvfp4 = Nvfp4Weight.quantize(weight, runs)
    if kind == "nvfp4":
        return made_nvfp4
    return replace(made_nvfp4, global_scales=made_nvfp4.global_scales.reciprocal(), divides=False)


def meant(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight that a product in `dtype` uses.

    int4's scales are rounded to it, as in compressed-tensors; factors of the other formats multiply the fp32 sums.
    """
    return weight.dequantized(dtype if weight.name == "int4" else torch.float32)


def make_experts(
    kinds: tuple[str, str], hidden_size: int, expert_size: int, experts: int
) -> tuple[QuantizedWeight, QuantizedWeight]:
    """gate_up and down; experts, gate and up have different magnitudes, so that a wrong factor shows."""
    sizes = torch.linspace(0.5, 2.0, experts)[:, None, None]
    gate_up = torch.randn(experts, 2 * expert_size, hidden_size) / hidden_size**0.5 * sizes
    gate_up[:, :expert_size] *= 0.6
    down = torch.randn(experts, hidden_size, expert_size) / expert_size**0.5 * sizes
    return quantized(kinds[0], gate_up, runs=2), quantized(kinds[1], down)


# tokens, hidden_size, expert_size, experts, top_k, routing
CASES = [
    (24, 384, 128, 8, 4, "distinct"),
    (9, 2816, 704, 2, 2, "distinct"),  # the model's sizes, few experts; 704 is no multiple of 128
    (1, 128, 128, 4, 2, "distinct"),
    (130, 128, 256, 3, 2, "one expert"),  # several blocks of tokens
    (40, 256, 128, 8, 3, "holes"),
    (4, 128, 128, 2, 2, "nothing"),
]
if BACKEND == "sim":  # where each expert of the model's sizes takes a second
    CASES[1] = (9, 2816, 704, 1, 1, "distinct")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_are_right(
    case: tuple[int, int, int, int, int, str], kind: str, dtype: torch.dtype, cpu_variant: str
) -> None:
    tokens, hidden_size, expert_size, experts, top_k, routing = case
    kinds = (kind, "int4-64" if kind == "int4-128" and expert_size % 128 else kind)
    gate_up, down = make_experts(kinds, hidden_size, expert_size, experts)
    check_experts(tokens, top_k, routing, gate_up, down, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", [("fp8", "nvfp4"), ("int4-32", "fp8"), ("nvfp4", "int4-64")], ids=str)
def test_formats_mix(kinds: tuple[str, str], dtype: torch.dtype, cpu_variant: str) -> None:
    check_experts(12, 3, "distinct", *make_experts(kinds, 128, 64, 5), dtype)


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(16, 16), (48, 80), (112, 16)], ids=str)
def test_short_rows(sizes: tuple[int, int], dtype: torch.dtype, cpu_variant: str) -> None:
    """Row lengths that no register divides; the nvfp4 kernel takes two groups at a time."""
    check_experts(7, 2, "distinct", *make_experts(("nvfp4", "fp8"), *sizes, 3), dtype)
    check_experts(7, 2, "distinct", *make_experts(("fp8", "nvfp4"), *sizes, 3), dtype)


@cpu_only
@pytest.mark.parametrize("power", [-127, -100, 121])
def test_scales_at_the_ends_of_the_range(power: int, cpu_variant: str) -> None:
    """The scales at the ends of the range: 56 times the last is finite; a scale of 2^122 is too large."""
    gate_up, down = make_experts(("int4-32", "int4-32"), 128, 128, 2)
    codes = torch.randint(1, 16, (2, 128, 64, 2), dtype=torch.uint8)  # -7 to 7
    down = replace(
        down,
        values=codes[..., 0] | codes[..., 1] << 4,
        scales=(torch.rand(2, 128, 4) * 0.1 + 1.02).mul(2.0**power).bfloat16(),
    )
    # Inputs are so small that sums stay finite too.
    input, ids = torch.randn(8, 128).bfloat16() * 2.0**-8, route("one expert", 8, 2, 1)
    scales = torch.full((8, 1), 2.0 ** min(-power, 126))
    actual = quantized_gemm.moe_ffn(input, ids, scales, gate_up, down).double()
    wide = replace(down, scales=(down.scales.float() * 2.0**-power).bfloat16())
    exact = torch.as_tensor(
        reference.moe_ffn(input, ids, torch.ones(8, 1), meant(gate_up, torch.bfloat16), meant(wide, torch.bfloat16))
    ).double() * float(scales[0, 0] * 2.0**power)
    largest = float(exact.abs().max())
    if power < -126:
        # The weight, or eight times it; subnormal results may be zero.
        assert float(actual.abs().max()) <= largest * 4
    else:
        torch.testing.assert_close(actual, exact, rtol=0, atol=largest * 0.01)


@cpu_only
@pytest.mark.parametrize("format", ["int4-32", "nvfp4"])
def test_scales_of_zero_make_weights_of_zero(format: str, cpu_variant: str) -> None:
    gate_up, down = make_experts((format, format), 128, 128, 2)
    scales = down.scales.clone()
    scales[0] = 0
    scales[1] = torch.tensor(0x80, dtype=torch.uint8) if scales.dtype == torch.uint8 else -0.0
    input, ids = torch.randn(8, 128).bfloat16(), route("distinct", 8, 2, 2)
    output = quantized_gemm.moe_ffn(input, ids, torch.ones(8, 2), gate_up, replace(down, scales=scales))
    assert not output.any()


def check_experts(
    tokens: int, top_k: int, routing: str, gate_up: QuantizedWeight, down: QuantizedWeight, dtype: torch.dtype
) -> None:
    experts, hidden_size, _ = down.shape
    input = torch.randn(tokens, hidden_size).to(dtype)
    ids = route(routing, tokens, experts, top_k)
    scales = torch.rand(tokens, top_k) + 0.1
    scales[ids < 0] = float("nan")
    actual = quantized_gemm.moe_ffn(input, ids, scales, gate_up, down)
    exact = reference.moe_ffn(input, ids, scales, meant(gate_up, dtype), meant(down, dtype))
    low = reference.moe_ffn_rounded(input, ids, scales, gate_up.dequantized(dtype), down.dequantized(dtype))
    assert_close(actual, exact, dtype, low)
    # A token's bits do not depend on other tokens.
    half = slice(0, (tokens + 1) // 2)
    arguments = (part[half].contiguous() for part in (input, ids, scales))
    assert torch.equal(quantized_gemm.moe_ffn(*arguments, gate_up, down), actual[half])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes", [(1, 128, 64), (70, 256, 100), (5, 2816, 40), (3, 128, 1), (70, 256, 112), (26, 2816, 48)], ids=str
)
def test_projection_is_right(sizes: tuple[int, int, int], kind: str, dtype: torch.dtype, cpu_variant: str) -> None:
    rows, in_features, out_features = sizes
    if BACKEND != "cpu" and out_features % 8:
        pytest.skip("a GPU takes features in multiples of eight")
    input = torch.randn(rows, in_features).to(dtype)
    weight = quantized(kind, torch.randn(out_features, in_features) / in_features**0.5)
    actual = quantized_gemm.dense(input, weight)
    exact = dense_reference.dense(input, meant(weight, dtype))
    assert_close(actual, exact, dtype, dense_reference.dense_rounded(input, weight.dequantized(dtype)))
    assert torch.equal(weights.linear(input[None], weight), actual[None])
    assert torch.equal(quantized_gemm.dense(input[:1].contiguous(), weight), actual[:1])


@cpu_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [2, 32])
def test_every_code_is_decoded(rows: int, kind: str, cpu_variant: str) -> None:
    """A product with the identity is the weight: all 256 codes of e4m3, all 16 of the others, with uneven scales."""
    codes = torch.arange(256, dtype=torch.uint8)
    turned = torch.stack([codes.roll(37 * row) for row in range(rows)])
    if kind == "fp8":
        turned[(turned & 0x7F) == NAN_CODE] = 0
        weight: QuantizedWeight = Fp8Weight(turned, torch.linspace(0.625, 3.0, rows))
    else:
        weight = quantized(kind, torch.randn(rows, 256))
        weight = replace(weight, values=turned[:, :128] * 2 | turned[:, :128] >> 7)
    size = weight.shape[1]
    for dtype in DTYPES:
        product = quantized_gemm.dense(torch.eye(size, dtype=dtype), weight)
        # A factor is multiplied after the codes are rounded, so the last bit of bfloat16 may differ.
        wanted = weight.dequantized(torch.float32).T
        torch.testing.assert_close(product.float(), wanted, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0)


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["fp8", "int4-32", "int4-float16", "nvfp4"])
def test_every_number_of_tokens(kind: str, dtype: torch.dtype, cpu_variant: str) -> None:
    """Up to two tiles of tokens, with factors that change within the rows of a tile."""
    input = torch.randn(50, 288).to(dtype)
    full = torch.randn(48, 288) * torch.linspace(0.5, 2.0, 6).repeat_interleave(8)[:, None]
    weight = quantized(kind, full, runs=6)
    together = quantized_gemm.dense(input, weight)
    exact = dense_reference.dense(input, meant(weight, dtype))
    assert_close(together, exact, dtype, dense_reference.dense_rounded(input, weight.dequantized(dtype)))
    for tokens in range(1, 50):
        assert torch.equal(quantized_gemm.dense(input[:tokens].contiguous(), weight), together[:tokens]), tokens


@cpu_only
@pytest.mark.parametrize("kind", KINDS)
def test_plain_form_is_right(kind: str) -> None:
    """Beside float64 with the weights that it multiplies, which are not rounded to the input's type."""
    gate_up, down = make_experts((kind, kind), 128, 128, 3)
    input, ids = torch.randn(6, 128, dtype=torch.bfloat16), route("distinct", 6, 3, 2)
    scales = torch.rand(6, 2)
    plain = quantized_gemm_plain.moe_ffn_quantized(
        input, ids, scales, *quantized_gemm._parts(gate_up), *quantized_gemm._parts(down)
    )
    matrices = (gate_up.dequantized(torch.float32), down.dequantized(torch.float32))
    assert_close(plain, reference.moe_ffn(input, ids, scales, *matrices), torch.bfloat16)
    weight = quantized(kind, torch.randn(24, 128))
    plain = quantized_gemm_plain.dense_quantized(input, *quantized_gemm._parts(weight))
    assert_close(plain, dense_reference.dense(input, weight.dequantized(torch.float32)), torch.bfloat16)


@cpu_only
def test_opcheck() -> None:
    gate_up, down = make_experts(("int4-32", "fp8"), 64, 32, 3)
    parts = (*quantized_gemm._parts(gate_up), *quantized_gemm._parts(down))
    library.opcheck(
        torch.ops.dgemma.moe_ffn_quantized.default,
        (torch.randn(4, 64), route("distinct", 4, 3, 2), torch.rand(4, 2), *parts),
    )
    weight = quantized("nvfp4", torch.randn(24, 64))
    library.opcheck(torch.ops.dgemma.dense_quantized.default, (torch.randn(4, 64), *quantized_gemm._parts(weight)))


@cpu_only
def test_bad_arguments() -> None:
    gate_up, down = make_experts(("int4-32", "int4-32"), 64, 32, 3)
    input, ids, scales = torch.randn(4, 64), route("distinct", 4, 3, 2), torch.rand(4, 2)
    with pytest.raises(ValueError, match=r"gate_up: got shape \[3, 64, 64\], wants \[3, 64, 32\]"):
        quantized_gemm.moe_ffn(torch.randn(4, 32), ids, scales, gate_up, replace(down, values=down.values[:, :32]))
    with pytest.raises(ValueError, match=r"input: got .*float64"):
        quantized_gemm.moe_ffn(input.double(), ids, scales, gate_up, down)
    bad = ids.clone()
    bad[1, 0] = 9
    with pytest.raises(ValueError, match="expert_ids: got 9 at token 1, slot 0, wants -1 or 0 to 2"):
        quantized_gemm.moe_ffn(input, bad, scales, gate_up, down)
    with pytest.raises(ValueError, match=r"weight: got shape \[24, 64\], wants \[24, 32\]"):
        quantized_gemm.dense(torch.randn(4, 32), quantized("fp8", torch.randn(24, 64)))
    values, codes = torch.zeros(8, 64, dtype=torch.uint8), torch.zeros(8, 32, dtype=torch.uint8)
    scales_of_48 = torch.zeros(8, 4, dtype=torch.bfloat16)
    for arguments, message in (
        ((9, codes, None, None), r"format: got 9, wants 1 \(fp8\), 2 \(int4\), 3 \(nvfp4\) or 4 \(int8\)"),
        ((1, codes, None, None), r"weight: got shape \[8, 32\], wants \[8, 64\]"),
        ((2, codes, None, None), r"weight.group: got 0, wants 0 \(fp8, int8\), 32, 64 or 128 \(int4\)"),
        ((2, codes, scales_of_48, None), r"weight.group: got 16"),
        (
            (2, codes, scales_of_48.float(), None),
            r"weight: got scales of torch.float32, wants torch.bfloat16 or",
        ),
        ((2, codes, torch.zeros(8, 5, dtype=torch.half), None), r"weight: got 5 scales in a row, wants a divisor"),
        ((1, values, None, torch.ones(3)), r"weight: got 3 scales of rows, wants a divisor of its 8 rows"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.ops.dgemma.dense_quantized(torch.randn(4, 64), *arguments)
