"""The products of `grouped_gemm` over quantized weights: moe_ffn and the dense projection."""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma_ext.ops.formats import FORMATS, Fp8Weight, QuantizedWeight
from dgemma_ext.ops.operators import operator

_moe_ffn_quantized, _moe_ffn_fp8 = operator("moe_ffn_quantized"), operator("moe_ffn_fp8")
_dense_quantized = operator("dense_quantized")


def moe_ffn(
    input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight
) -> Tensor:
    """`grouped_gemm.moe_ffn` with quantized weights, each of any format.

    On the CPU a weight is decoded for the tile that multiplies it: its scale of a group is multiplied in and rounded
    once to the dtype of `input`, its scale of a row multiplied into the finished sum. By int8 each row of `input`, and
    of the activation between, is rounded to int8 under its largest magnitude / 127, and sums are exact, on a GPU too.

    Args:
        input: [tokens, hidden_size], float32 or bfloat16.
        expert_ids: [tokens, top_k], int32, each in [0, experts), or -1 for a slot to skip.
        expert_weights: [tokens, top_k], float32.
        gate_up: a quantized [experts, 2 * expert_size, hidden_size].
        down: a quantized [experts, hidden_size, expert_size].

    Returns:
        [tokens, hidden_size], dtype of input.

    Raises:
        ValueError: an argument has another dtype, shape or device, or an id is out of range.
    """
    result: Tensor = _moe_ffn_quantized(input, expert_ids, expert_weights, *_parts(gate_up), *_parts(down))
    return result


def moe_ffn_fp8(
    input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight
) -> Tensor:
    """`moe_ffn` with activations in FP8 too, as float-quantized checkpoints with dynamic activations mean it.

    Each row of `input`, and of h = gelu_tanh(gate x) * (up x) after it was rounded to the dtype of `input`, is divided
    by its largest magnitude / 448 and rounded to e4m3 (to nearest, ties to even); its products are multiplied by that
    again. Rounding both in turn moves a result by about 4 % of its norm.

    A GPU of compute capability 8.9, 9.0 or 12.x multiplies e4m3 (bfloat16 input alone). On the CPU it is written in
    torch, which is exact up to the roundings named and slow.

    Arguments and result as of `moe_ffn`; both weights are fp8.

    Raises:
        ValueError: as `moe_ffn`, for weights of another format, and on a GPU that has no kernel for it.
    """
    if gate_up.name != "fp8" or down.name != "fp8":
        name, weight = ("down", down) if gate_up.name == "fp8" else ("gate_up", gate_up)
        raise ValueError(f"{name}: got weights in {weight.name}, wants fp8")
    result: Tensor = _moe_ffn_fp8(
        *(input, expert_ids, expert_weights),
        *(gate_up.values, gate_up.kernel_row_scales, down.values, down.kernel_row_scales),
    )
    return result


def check_moe_ffn_fp8(hidden_size: int, expert_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
    """Raises ValueError, naming what is supported, where `moe_ffn_fp8` does not take these sizes, this dtype or this
    device: it is called once, for one token and one expert of zeros."""
    matrices = [
        Fp8Weight(torch.zeros(shape, dtype=torch.uint8, device=device), _ones(shape[:2], device))
        for shape in ((1, 2 * expert_size, hidden_size), (1, hidden_size, expert_size))
    ]
    input = torch.zeros((1, hidden_size), dtype=dtype, device=device)
    ids = torch.zeros((1, 1), dtype=torch.int32, device=device)
    moe_ffn_fp8(input, ids, _ones((1, 1), device), *matrices)


def _ones(shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    return torch.ones(shape, dtype=torch.float32, device=device)


def dense(input: Tensor, weight: QuantizedWeight) -> Tensor:
    """input @ weight.T for a quantized weight [out_features, in_features]: [rows, out_features].

    input: [rows, in_features], float32 or bfloat16. Raises ValueError as moe_ffn does.
    """
    result: Tensor = _dense_quantized(input, *_parts(weight))
    return result


def _parts(weight: QuantizedWeight) -> tuple[int, Tensor, Tensor | None, Tensor | None]:
    """A weight as the operators take it: format, codes, scales of groups of columns, scales of rows."""
    return FORMATS[weight.name].number, weight.values, weight.kernel_scales, weight.kernel_row_scales
