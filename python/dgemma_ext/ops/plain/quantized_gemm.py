"""The operators of `quantized_gemm` in torch's operators: a GPU's form without kernels, and the CPU's of `moe_ffn_fp8`.

`moe_ffn_fp8` has no kernel for the CPU, which multiplies no e4m3: this one shows anywhere which tokens FP8 activations
give. Tests hold the kernels for GPUs to it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext.ops.formats import QuantizedWeight, format_by_number
from dgemma_ext.ops.plain import grouped_gemm as grouped_gemm_plain
from dgemma_ext.ops.plain.registration import register


def moe_ffn_quantized(
    input: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up_format: int,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_row_scales: Tensor | None,
    down_format: int,
    down: Tensor,
    down_scales: Tensor | None,
    down_row_scales: Tensor | None,
) -> Tensor:
    """As `dgemma_ext.ops.quantized_gemm.moe_ffn`, from float32 copies of both matrices; by int8 one expert that is hit
    after another, its tokens rounded."""
    weights = (
        _weight(gate_up_format, gate_up, gate_up_scales, gate_up_row_scales),
        _weight(down_format, down, down_scales, down_row_scales),
    )
    if "int8" not in {weight.name for weight in weights}:
        dequantized = (weight.dequantized(torch.float32) for weight in weights)
        return grouped_gemm_plain.moe_ffn(input, expert_ids, expert_weights, *dequantized)
    experts, hidden_size, expert_size = weights[1].shape
    products = torch.zeros((*expert_ids.shape, hidden_size), dtype=torch.float32, device=input.device)
    for expert in grouped_gemm_plain.hit_experts(expert_ids, experts):
        token, slot = torch.where(expert_ids == expert)
        gate, up = _product(input[token], weights[0].expert(expert)).split(expert_size, dim=-1)
        h = (functional.gelu(gate, approximate="tanh") * up).to(input.dtype)
        products[token, slot] = _product(h, weights[1].expert(expert))
    total = torch.zeros((len(input), hidden_size), dtype=torch.float32, device=input.device)
    for k in range(expert_ids.shape[1]):
        total += torch.where(expert_ids[:, k] >= 0, expert_weights[:, k], 0.0)[:, None] * products[:, k]
    return total.to(input.dtype)


def _product(rows: Tensor, weight: QuantizedWeight) -> Tensor:
    """rows @ weight.T in float32; by int8 the rows are rounded, and sums are exact (float64 holds them)."""
    if weight.name != "int8":
        return functional.linear(rows.float(), weight.dequantized(torch.float32))
    codes, scales = rows_to_int8(rows)
    sums = functional.linear(codes.double(), weight.values.view(torch.int8).double()).float()
    product: Tensor = sums * scales
    return product if weight.kernel_row_scales is None else product * weight.kernel_row_scales


def rows_to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their largest magnitude / 127, to the nearest integer, and that quotient: int8 [n, columns] and
    float32 [n, 1], as csrc/grouped_gemm/cpu/int8_round.h, in fp32. A row of zeros has scale 0."""
    largest = rows.float().abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, 0.0)
    return (rows.float() * inverse).round().to(torch.int8), largest / 127.0


def moe_ffn_fp8(
    input: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    gate_up_row_scales: Tensor | None,
    down: Tensor,
    down_row_scales: Tensor | None,
) -> Tensor:
    """As `dgemma_ext.ops.quantized_gemm.moe_ffn_fp8`, one expert that is hit after another.

    Sums are made in float64, which holds every sum of up to 2^17 products of e4m3 exactly: the only roundings are those
    that are meant, and a token's bits do not depend on how many others there are.
    """
    experts, hidden_size, expert_size = down.shape
    products = torch.zeros((*expert_ids.shape, hidden_size), dtype=torch.float64, device=input.device)
    for expert in grouped_gemm_plain.hit_experts(expert_ids, experts):
        token, slot = torch.where(expert_ids == expert)
        gate, up = _product_of_rows(input[token], gate_up, gate_up_row_scales, expert).split(expert_size, dim=-1)
        h = (functional.gelu(gate, approximate="tanh") * up).to(input.dtype)
        products[token, slot] = _product_of_rows(h, down, down_row_scales, expert)
    weights = torch.where(expert_ids >= 0, expert_weights, 0.0).double()
    total = torch.zeros((len(input), hidden_size), dtype=torch.float64, device=input.device)
    for k in range(expert_ids.shape[1]):
        total += weights[:, k, None] * products[:, k]
    return total.to(input.dtype)


def _product_of_rows(rows: Tensor, values: Tensor, row_scales: Tensor | None, expert: int) -> Tensor:
    """rows @ matrix.T in float64 for one expert's matrix of e4m3 codes, the rows rounded to e4m3 too."""
    codes, scales = rows_to_e4m3(rows)
    product = functional.linear(codes.double(), values[expert].view(torch.float8_e4m3fn).double())
    if row_scales is not None:
        per_expert = row_scales.reshape(len(values), -1).double()[expert]
        product *= per_expert.repeat_interleave(values.shape[1] // len(per_expert))
    return product * scales.double()


def rows_to_e4m3(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their largest magnitude / 448, to the nearest e4m3, and that quotient: [n, columns] as
    float8_e4m3fn and float32 [n, 1], as csrc/grouped_gemm/cuda/quantize_rows.cu, in fp32. A row of zeros has scale 0.
    """
    greatest = torch.finfo(torch.float8_e4m3fn).max
    largest = rows.float().abs().amax(-1, keepdim=True)
    # Not `448 / largest`: torch makes a product with the reciprocal of that, which is rounded once more.
    inverse = torch.where(largest > 0, torch.full_like(largest, greatest) / largest, 0.0)
    codes = (rows.float() * inverse).clamp(-greatest, greatest).to(torch.float8_e4m3fn)
    return codes, largest / greatest


def dense_quantized(
    input: Tensor, format: int, weight: Tensor, scales: Tensor | None, row_scales: Tensor | None
) -> Tensor:
    """As `dgemma_ext.ops.quantized_gemm.dense`."""
    return _product(input, _weight(format, weight, scales, row_scales)).to(input.dtype)


def _weight(format: int, values: Tensor, scales: Tensor | None, row_scales: Tensor | None) -> QuantizedWeight:
    """The operator's arguments as the type they came from."""
    return format_by_number(format).weight.from_kernel(values, scales, row_scales)


register("dgemma::moe_ffn_quantized", moe_ffn_quantized)
register("dgemma::moe_ffn_fp8", moe_ffn_fp8)
register("dgemma::dense_quantized", dense_quantized)
