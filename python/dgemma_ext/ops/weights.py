"""Products over a model's weights, whichever way each is kept: a tensor, or quantized in any format."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext.ops import grouped_gemm, quantized_gemm
from dgemma_ext.ops.description import workspace_bytes
from dgemma_ext.ops.formats import FORMATS, QuantizedWeight


def experts(
    input: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    activations: str | None = None,
) -> Tensor:
    """`moe_ffn` over weights of either kind, both of the same: that of `grouped_gemm` over tensors, that of
    `quantized_gemm` over quantized weights, and with activations "fp8" its `moe_ffn_fp8`."""
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        if activations is not None:
            raise ValueError(f"activations: got {activations} with unquantized weights, wants None")
        return grouped_gemm.moe_ffn(input, expert_ids, expert_weights, gate_up, down)
    if isinstance(gate_up, Tensor) or isinstance(down, Tensor):
        raise ValueError("gate_up, down: got an unquantized and a quantized weight, wants two of a kind")
    form = quantized_gemm.moe_ffn_fp8 if activations == "fp8" else quantized_gemm.moe_ffn
    return form(input, expert_ids, expert_weights, gate_up, down)


def linear(input: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """input [..., in_features] @ weight.T: torch's product, or `quantized_gemm.dense` for a quantized weight."""
    if isinstance(weight, Tensor):
        return functional.linear(input, weight)
    return quantized_gemm.dense(input.reshape(-1, input.shape[-1]), weight).view(*input.shape[:-1], weight.shape[0])


def experts_workspace_bytes(
    tokens: int,
    hidden_size: int,
    expert_size: int,
    experts: int,
    top_k: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    format: str | None,
    activations: str | None = None,
) -> int:
    """Bytes of workspace of `experts` for these sizes; `format`: of both weights, None for tensors."""
    cuda = torch.device(device).type == "cuda"
    name, formats = "moe_ffn", dict[str, int]()
    if format is not None:
        # On the CPU moe_ffn_fp8 is torch's operators; the quantized form's workspace stands for what they take.
        name = "moe_ffn_fp8" if activations == "fp8" and cuda else "moe_ffn_quantized"
        number = FORMATS[format].number
        formats = {} if name == "moe_ffn_fp8" else {"gate_up_format": number, "down_format": number}
    return workspace_bytes(
        name,
        bfloat16=dtype == torch.bfloat16,
        cuda=cuda,
        tokens=tokens,
        hidden_size=hidden_size,
        expert_size=expert_size,
        experts=experts,
        top_k=top_k,
        **formats,
    )


def dense_workspace_bytes(
    rows: int,
    in_features: int,
    out_features: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    format: str | None,
) -> int:
    """Bytes of workspace of a dense product of our own for these sizes: `grouped_gemm.dense` where `format` is None,
    else `quantized_gemm.dense` of a weight in it."""
    return workspace_bytes(
        "dense" if format is None else "dense_quantized",
        bfloat16=dtype == torch.bfloat16,
        cuda=torch.device(device).type == "cuda",
        rows=rows,
        in_features=in_features,
        out_features=out_features,
        **({} if format is None else {"format": FORMATS[format].number}),
    )
