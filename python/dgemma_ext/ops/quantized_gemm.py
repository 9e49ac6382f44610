"""The products of `grouped_gemm` over quantized weights: moe_ffn and the dense projection."""

from __future__ import annotations

import torch
from torch import Tensor, library
from torch.nn import functional

from dgemma_ext.ops import grouped_gemm
from dgemma_ext.ops.formats import Fp8Weight, QuantizedWeight
from dgemma_ext.ops.plain import quantized_gemm as quantized_gemm_plain  # noqa: F401  registers the plain forms

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
    _check_matrices(input, gate_up, down)
    try:
        result: Tensor = torch.ops.dgemma.moe_ffn_quantized(
            input, expert_ids, expert_weights, *_parts(gate_up), *_parts(down)
        )
    except RuntimeError as error:
        raise _as_value_error(error) from error
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
    _check_matrices(input, gate_up, down)
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if weight.name != "fp8":
            raise ValueError(f"{name}: got weights in {weight.name}, wants fp8")
    for name, got, dtype in (
        ("expert_ids", expert_ids, torch.int32),
        ("expert_weights", expert_weights, torch.float32),
    ):
        if got.dim() != 2 or got.dtype != dtype or got.shape != (len(input), expert_ids.shape[-1]):
            raise ValueError(f"{name}: got {list(got.shape)} of {got.dtype}, wants [{len(input)}, top_k] of {dtype}")
    try:
        result: Tensor = torch.ops.dgemma.moe_ffn_fp8(
            input, expert_ids, expert_weights, gate_up.values, gate_up.kernel_factors, down.values, down.kernel_factors
        )
    except RuntimeError as error:
        raise _as_value_error(error) from error
    return result


def check_moe_ffn_fp8(hidden_size: int, expert_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
    """Raises ValueError, naming what is supported, where `moe_ffn_fp8` does not take these sizes, this dtype or this
    device: it is called once, for one token and one expert of zeros."""
    matrices = [
        Fp8Weight(torch.zeros(shape, dtype=torch.uint8, device=device), torch.ones(shape[:2], device=device))
        for shape in ((1, 2 * expert_size, hidden_size), (1, hidden_size, expert_size))
    ]
    input = torch.zeros((1, hidden_size), dtype=dtype, device=device)
    ids = torch.zeros((1, 1), dtype=torch.int32, device=device)
    moe_ffn_fp8(input, ids, torch.ones((1, 1), device=device), *matrices)


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
    activations: str | None = None,
) -> Tensor:
    """moe_ffn over weights of either kind, both of the same; with activations "fp8" moe_ffn_fp8."""
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        if activations is not None:
            raise ValueError(f"activations: got {activations} with plain weights, wants None")
        return grouped_gemm.moe_ffn(input, expert_ids, expert_weights, gate_up, down)
    if isinstance(gate_up, Tensor) or isinstance(down, Tensor):
        raise ValueError("gate_up, down: got a plain and a quantized weight, wants two of a kind")
    form = moe_ffn_fp8 if activations == "fp8" else moe_ffn
    return form(input, expert_ids, expert_weights, gate_up, down)


def linear(input: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """input [..., in_features] @ weight.T: torch's product, or `dense` for a quantized weight."""
    if isinstance(weight, Tensor):
        return functional.linear(input, weight)
    return dense(input.reshape(-1, input.shape[-1]), weight).view(*input.shape[:-1], weight.shape[0])


def _check_matrices(input: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight) -> None:
    if input.dim() != 2 or input.dtype not in DTYPES:
        raise ValueError(f"input: got {list(input.shape)} of {input.dtype}, wants two dimensions of one of {DTYPES}")
    experts, _, expert_size = down.shape
    for name, got, wanted in (
        ("gate_up", gate_up.shape, (experts, 2 * expert_size, input.shape[1])),
        ("down", down.shape, (experts, input.shape[1], expert_size)),
    ):
        if tuple(got) != wanted:
            raise ValueError(f"{name}: got shape {list(got)}, wants {list(wanted)}")


def _parts(weight: QuantizedWeight) -> tuple[int, Tensor, Tensor | None, Tensor | None]:
    return FORMAT_NUMBERS[weight.name], weight.values, weight.kernel_scales, weight.kernel_factors


def _as_value_error(error: RuntimeError) -> Exception:
    """torch before 2.13 keeps no more of the operator's ValueError than its words."""
    message = str(error)
    return ValueError(message) if message.startswith("dgemma::") else error


@library.register_fake("dgemma::moe_ffn_quantized")
def _moe_ffn_fake(input: Tensor, *_: object) -> Tensor:
    return torch.empty_like(input)


@library.register_fake("dgemma::moe_ffn_fp8")
def _moe_ffn_fp8_fake(input: Tensor, *_: object) -> Tensor:
    return torch.empty_like(input)


@library.register_fake("dgemma::dense_quantized")
def _dense_fake(input: Tensor, format: int, weight: Tensor, scales: Tensor | None, factors: Tensor | None) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0]))
