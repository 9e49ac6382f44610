"""Products with weights in INT8, their tokens rounded too: experts and the dense projection, beside exact integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from backend import BACKEND, DTYPES
from bounds import assert_close
from dgemma_ext.ops import quantized_gemm
from dgemma_ext.ops.formats import Int8Weight
from dgemma_ext.ops.plain import quantized_gemm as plain
from reference import grouped_gemm as reference

# hidden, rows or expert size, tokens. Columns: the model's of down, a step and a half.
SIZES = [(704, 96, 34), (96, 80, 9)]
if BACKEND == "cpu":  # columns less than a step, and such that no step divides; a GPU takes multiples of 16
    SIZES += [(7, 5, 3), (130, 33, 35)]


def rounded(rows: Tensor) -> Tensor:
    """Each row to the integers of its largest magnitude / 127, times that, in float64; ties to even in fp32."""
    largest = rows.float().abs().amax(-1, keepdim=True)
    codes = (rows.float() * torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)).round()
    return codes.double() * (largest / 127).double()


def exact(weight: Int8Weight) -> Tensor:
    return weight.values.view(torch.int8).double() * weight.scales.double()[..., None]


def experts(hidden: int, size: int, tokens: int, dtype: torch.dtype) -> Any:
    gate_up = Int8Weight.quantize(torch.randn(4, 2 * size, hidden) * hidden**-0.5)
    down = Int8Weight.quantize(torch.randn(4, hidden, size) * size**-0.5)
    ids = torch.randint(3, (tokens, 2), dtype=torch.int32)  # none to the last expert
    ids[:, 1] = (ids[:, 0] + 1) % 3
    ids[0, 1] = -1
    return torch.randn(tokens, hidden).to(dtype), ids, torch.rand(tokens, 2), gate_up, down


def oracle(input: Tensor, ids: Tensor, weights: Tensor, gate_up: Int8Weight, down: Int8Weight) -> Tensor:
    """float64 over dequantized weights and rounded activations; h is rounded to the input's dtype first."""
    total = torch.zeros(len(input), down.shape[1], dtype=torch.float64)
    gate_ups, downs = exact(gate_up), exact(down)
    for token, row in enumerate(rounded(input)):
        for slot, expert in enumerate(ids[token].tolist()):
            if expert >= 0:
                gate, up = (row @ gate_ups[expert].T).chunk(2)
                h = (functional.gelu(gate, approximate="tanh") * up).to(input.dtype)
                total[token] += weights[token, slot].double() * (rounded(h[None]) @ downs[expert].T)[0]
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "size", "tokens"), SIZES)
def test_int8_dense_has_the_bits_of_exact_sums(
    cpu_variant: str, hidden: int, size: int, tokens: int, dtype: torch.dtype
) -> None:
    """On every backend, so that a GPU has the CPU's bits."""
    weight = Int8Weight.quantize(torch.randn(size, hidden))
    input = (torch.randn(tokens, hidden) * torch.logspace(-3, 3, tokens)[:, None]).to(dtype)
    input[0] = 0.0
    got = quantized_gemm.dense(input, weight)
    assert torch.equal(got, plain.dense_quantized(input, 4, weight.values, None, weight.scales))
    assert_close(got, rounded(input) @ exact(weight).T, dtype, got)
    # A row's bits are those that it has alone.
    assert torch.equal(quantized_gemm.dense(input[2:3].clone(), weight), got[2:3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extreme", [-128, 127])
def test_the_largest_sums(cpu_variant: str, extreme: int, dtype: torch.dtype) -> None:
    """Every code the largest: sums of 16,384 products, which pairs of 16 bits would not hold."""
    values = torch.full((8, 16384), extreme, dtype=torch.int8).view(torch.uint8)
    for sign in (1.0, -1.0):
        got = quantized_gemm.dense(torch.full((3, 16384), sign, dtype=dtype), Int8Weight(values, torch.ones(8)))
        wanted = torch.full((3, 8), sign * extreme * 127 * 16384 * float(torch.tensor(1 / 127)))
        assert torch.equal(got, wanted.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "size", "tokens"), SIZES)
def test_int8_experts(cpu_variant: str, hidden: int, size: int, tokens: int, dtype: torch.dtype) -> None:
    """Against the oracle by the bound of weights of 8 bits and more: an integer of h that falls to the other side of
    half moves a result by more than its products' rounding."""
    arguments = experts(hidden, size, tokens, dtype)
    input, ids, weights, gate_up, down = arguments
    got = quantized_gemm.moe_ffn(*arguments)
    wanted = oracle(*arguments)
    size_of = wanted.square().sum() + got.double().square().sum()
    assert float(1 - 2 * (wanted * got.double()).sum() / size_of) < 1e-5
    matrices = [(4, matrix.values, None, matrix.scales) for matrix in (gate_up, down)]
    in_torch = plain.moe_ffn_quantized(input, ids, weights, *matrices[0], *matrices[1])
    error, of_torch = ((one.double() - wanted).abs().max() for one in (got, in_torch))
    assert float(error) <= 2 * float(of_torch) + 2 * torch.finfo(dtype).eps * float(wanted.abs().max())
    # Not what unrounded activations give.
    unrounded = torch.as_tensor(reference.moe_ffn(input, ids, weights, exact(gate_up), exact(down)))
    if hidden > 7:
        assert float((unrounded - wanted).norm() / wanted.norm()) > 1e-3
    assert torch.equal(quantized_gemm.moe_ffn(*(one[:1].clone() for one in arguments[:3]), gate_up, down), got[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "size", "tokens"), SIZES)
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others(
    cpu_variant: str, hidden: int, size: int, tokens: int, dtype: torch.dtype
) -> None:
    """Wherever in the token the value stands, before and after larger ones."""
    input, ids, weights, gate_up, down = experts(hidden, size, tokens, dtype)
    weight = Int8Weight.quantize(torch.randn(size, hidden))
    bad = input.clone()
    values = [float("nan"), float("inf"), float("nan"), float("-inf")][: tokens - 1]
    for token, value in enumerate(values):  # in the first column, .. in the last one
        bad[token, token * (hidden - 1) // (len(values) - 1)] = value
    spoilt = bad.isfinite().logical_not().any(-1)
    for f in (
        lambda x: quantized_gemm.dense(x, weight),
        lambda x: quantized_gemm.moe_ffn(x, ids, weights, gate_up, down),
    ):
        got, clean = f(bad), f(input)
        assert clean.isfinite().all()
        assert got[spoilt].isnan().all()
        assert torch.equal(got[~spoilt], clean[~spoilt])
    # Activations beyond what the dtype holds, of a finite token.
    large = input.clone()
    large[0] = 1e25 if dtype == torch.bfloat16 else 1e22
    got = quantized_gemm.moe_ffn(large, ids, weights, gate_up, down)
    assert got[0].isnan().all()
    assert got[1:].isfinite().all()
