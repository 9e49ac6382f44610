"""The products of `grouped_gemm` over quantized weights: moe_ffn and the dense projection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext.ops import (
    grouped_gemm,
    quantized_gemm_plain,  # noqa: F401  registers the plain form for CUDA
)
from dgemma_ext.quantized.formats import QuantizedWeight

# dgemma_weight_format of csrc/include/dgemma/grouped_gemm.h.
FORMAT_NUMBERS = {"fp8": 1, "int4": 2, "nvfp4": 3}
DTYPES = (torch.float32, torch.bfloat16)


def moe_ffn(
    input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight
) -> Tensor:
    """`grouped_gemm.moe_ffn` with quantized weights, each of any format.

    On the CPU a weight is decoded for the tile that multiplies it: its scale of a group is multiplied in and rounded
    once to the dtype of `input`, its scale of a row multiplied into the finished sum.

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
    if input.dim() != 2 or input.dtype not in DTYPES:
        raise ValueError(f"input: got {list(input.shape)} of {input.dtype}, wants two dimensions of one of {DTYPES}")
    experts, _, expert_size = down.shape
    for name, got, wanted in (
        ("gate_up", gate_up.shape, (experts, 2 * expert_size, input.shape[1])),
        ("down", down.shape, (experts, input.shape[1], expert_size)),
    ):
        if tuple(got) != wanted:
            raise ValueError(f"{name}: got shape {list(got)}, wants {list(wanted)}")
    try:
        result: Tensor = torch.ops.dgemma.moe_ffn_quantized(
            input, expert_ids, expert_weights, *_parts(gate_up), *_parts(down)
        )
    except RuntimeError as error:
        raise _as_value_error(error) from error
    return result


def dense(input: Tensor, weight: QuantizedWeight) -> Tensor:
    """input @ weight.T for a quantized weight [out_features, in_features]: [rows, out_features].

    input: [rows, in_features], float32 or bfloat16. Raises ValueError as moe_ffn does.
    """
    if input.dim() != 2 or input.dtype not in DTYPES:
        raise ValueError(f"input: got {list(input.shape)} of {input.dtype}, wants two dimensions of one of {DTYPES}")
    if len(weight.shape) != 2 or weight.shape[1] != input.shape[1]:
        raise ValueError(f"weight: got shape {list(weight.shape)}, wants [out_features, {input.shape[1]}]")
    try:
        result: Tensor = torch.ops.dgemma.dense_quantized(input, *_parts(weight))
    except RuntimeError as error:
        raise _as_value_error(error) from error
    return result


def experts(
    input: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
) -> Tensor:
    """moe_ffn over weights of either kind, both of the same."""
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        return grouped_gemm.moe_ffn(input, expert_ids, expert_weights, gate_up, down)
    if isinstance(gate_up, Tensor) or isinstance(down, Tensor):
        raise ValueError("gate_up, down: got a plain and a quantized weight, wants two of a kind")
    return moe_ffn(input, expert_ids, expert_weights, gate_up, down)


def linear(input: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """input [..., in_features] @ weight.T: torch's product, or `dense` for a quantized weight."""
    if isinstance(weight, Tensor):
        return functional.linear(input, weight)
    return dense(input.reshape(-1, input.shape[-1]), weight).view(*input.shape[:-1], weight.shape[0])


def _parts(weight: QuantizedWeight) -> tuple[int, Tensor, Tensor | None, Tensor | None]:
    return FORMAT_NUMBERS[weight.name], weight.values, weight.kernel_scales, weight.kernel_factors


def _as_value_error(error: RuntimeError) -> Exception:
    """torch before 2.13 keeps no more of the operator's ValueError than its words."""
    message = str(error)
    return ValueError(message) if message.startswith("dgemma::") else error


@torch.library.register_fake("dgemma::moe_ffn_quantized")
def _moe_ffn_fake(input: Tensor, *_: object) -> Tensor:
    return torch.empty_like(input)


@torch.library.register_fake("dgemma::dense_quantized")
def _dense_fake(input: Tensor, format: int, weight: Tensor, scales: Tensor | None, factors: Tensor | None) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0]))
