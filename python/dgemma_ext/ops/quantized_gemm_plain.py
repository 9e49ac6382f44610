"""The operators of `quantized_gemm` in plain torch: what runs where no kernel is written yet."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext.ops import grouped_gemm_plain
from dgemma_ext.ops.plain import register
from dgemma_ext.quantized.formats import Fp8Weight, Int4Weight, Nvfp4Weight, QuantizedWeight


def moe_ffn_quantized(
    input: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up_format: int,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_factors: Tensor | None,
    down_format: int,
    down: Tensor,
    down_scales: Tensor | None,
    down_factors: Tensor | None,
) -> Tensor:
    """As `dgemma_ext.ops.quantized_gemm.moe_ffn`, from float32 copies of both matrices."""
    return grouped_gemm_plain.moe_ffn(
        input,
        expert_ids,
        expert_weights,
        _weight(gate_up_format, gate_up, gate_up_scales, gate_up_factors).dequantized(torch.float32),
        _weight(down_format, down, down_scales, down_factors).dequantized(torch.float32),
    )


def dense_quantized(
    input: Tensor, format: int, weight: Tensor, scales: Tensor | None, factors: Tensor | None
) -> Tensor:
    """As `dgemma_ext.ops.quantized_gemm.dense`."""
    dequantized = _weight(format, weight, scales, factors).dequantized(torch.float32)
    return functional.linear(input.float(), dequantized).to(input.dtype)


def _weight(format: int, values: Tensor, scales: Tensor | None, factors: Tensor | None) -> QuantizedWeight:
    """The operator's arguments as the type they came from."""
    if format == 1 and factors is not None:
        return Fp8Weight(values, factors)
    if format == 2 and scales is not None:
        return Int4Weight(values, scales)
    if format == 3 and scales is not None and factors is not None:
        return Nvfp4Weight(values, scales, factors, divides=False)
    raise ValueError(f"dgemma::moe_ffn_quantized: format: got {format} without its scales, wants 1, 2 or 3 with them")


register("dgemma::moe_ffn_quantized", moe_ffn_quantized)
register("dgemma::dense_quantized", dense_quantized)
