"""The mixture-of-experts feed-forward as one operator, from the router's choice to the combined output."""

from __future__ import annotations

import torch
from torch import Tensor, library

from dgemma_ext import _C
from dgemma_ext.ops.plain import grouped_gemm as grouped_gemm_plain  # noqa: F401  registers the plain form for CUDA

DTYPES = (torch.float32, torch.bfloat16)


def moe_ffn(
    input: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Runs every token through the experts that the router chose and sums their outputs.

    For token t, with e = expert_ids[t, k] and the gate rows first in gate_up[e]::

        h = gelu_tanh(gate_up[e, :expert_size] @ x) * (gate_up[e, expert_size:] @ x)
        out[t] = sum over k of expert_weights[t, k] * (down[e] @ h)

    This is `DiffusionGemmaTextExperts.forward` in transformers' modeling_diffusion_gemma.py, but products accumulate in
    fp32, h is rounded to the dtype once, and the slots are summed in order in fp32 and rounded once. A token's result
    does not depend on the other tokens of the call.

    Args:
        input: [tokens, hidden_size], float32 or bfloat16.
        expert_ids: [tokens, top_k], int32, each in [0, experts), or -1 for a slot to skip. A token whose slots are all
            -1 gives zero, and its input is not read.
        expert_weights: [tokens, top_k], float32.
        gate_up: [experts, 2 * expert_size, hidden_size], dtype of input; gate rows first.
        down: [experts, hidden_size, expert_size], dtype of input.
        out: where to write the result, like input; allocated when None.
        workspace: bytes (uint8), at least `moe_ffn_workspace(...)`, 64-byte aligned; allocated when None.

    Returns:
        [tokens, hidden_size], dtype of input.

    Raises:
        ValueError: an argument has another dtype, shape, layout or device, an id is out of range, or the workspace is
            too small; the message names the argument.
    """
    _check_tensors(input, expert_ids, expert_weights, gate_up, down)
    arguments = (input, expert_ids, expert_weights, gate_up, down)
    if out is None and workspace is None:
        return _called(torch.ops.dgemma.moe_ffn.default, *arguments)
    if out is None:
        out = torch.empty_like(input)
    _check("out", out, input.dtype, tuple(input.shape), input.device)
    if workspace is None:
        workspace = torch.empty(moe_ffn_workspace(*arguments), dtype=torch.uint8, device=input.device)
    _check("workspace", workspace, torch.uint8, (workspace.numel(),), input.device)
    _called(torch.ops.dgemma.moe_ffn.out, *arguments, out=out, workspace=workspace)
    return out


def moe_ffn_workspace(input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> int:
    """Bytes of workspace that `moe_ffn` needs for arguments of these shapes and dtype; values are not looked at."""
    _check_tensors(input, expert_ids, expert_weights, gate_up, down)
    experts, hidden_size, expert_size = down.shape
    return _C.moe_ffn_workspace(
        input.shape[0],
        hidden_size,
        expert_size,
        experts,
        expert_ids.shape[1],
        bfloat16=input.dtype == torch.bfloat16,
        cuda=input.is_cuda,
    )


def dense(input: Tensor, weight: Tensor) -> Tensor:
    """input @ weight.T, summed in fp32 and rounded once: [rows, out_features].

    Unlike torch's product its bits for a row depend on that row alone, not on how many rows there are. input is
    [rows, in_features], weight [out_features, in_features], both float32 or bfloat16 (on a GPU bfloat16, with features
    in multiples of 8). Raises ValueError naming an argument of another shape, dtype or device.
    """
    if input.dim() != 2 or input.dtype not in DTYPES:
        raise ValueError(f"input: got {list(input.shape)} of {input.dtype}, wants two dimensions of one of {DTYPES}")
    _check("input", input, input.dtype, tuple(input.shape), input.device)
    _check("weight", weight, input.dtype, (weight.shape[0], input.shape[1]), input.device)
    result: Tensor = torch.ops.dgemma.dense(input, weight)
    return result


@library.register_fake("dgemma::dense")
def _dense_fake(input: Tensor, weight: Tensor) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0]))


def _check_tensors(input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    if input.dtype not in DTYPES:
        raise ValueError(f"input: got {input.dtype}, wants torch.float32 or torch.bfloat16")
    for name, tensor, dimensions in (("input", input, 2), ("expert_ids", expert_ids, 2), ("down", down, 3)):
        if tensor.dim() != dimensions:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, wants {dimensions} dimensions")
    tokens, hidden_size = input.shape
    top_k = expert_ids.shape[1]
    experts, _, expert_size = down.shape
    for name, extent in (("input", hidden_size), ("expert_ids", top_k), ("down", experts), ("down", expert_size)):
        if extent == 0:
            raise ValueError(f"{name}: got an extent of 0, wants only the number of tokens to be 0")
    _check("input", input, input.dtype, (tokens, hidden_size), input.device)
    _check("expert_ids", expert_ids, torch.int32, (tokens, top_k), input.device)
    _check("expert_weights", expert_weights, torch.float32, (tokens, top_k), input.device)
    _check("gate_up", gate_up, input.dtype, (experts, 2 * expert_size, hidden_size), input.device)
    _check("down", down, input.dtype, (experts, hidden_size, expert_size), input.device)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: got {tensor.dtype}, wants {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, wants {list(shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, wants {device}, where input is")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {list(tensor.stride())}, wants a contiguous tensor")


def _called(op: torch._ops.OpOverload, *arguments: Tensor, **keywords: Tensor) -> Tensor:
    """Calls the op. What only the kernel looks at (ids, size of the workspace) is reported without the op's name."""
    try:
        return op(*arguments, **keywords)
    except (RuntimeError, ValueError) as error:
        message = str(error)
        if not message.startswith("dgemma::moe_ffn: "):
            raise
        raise ValueError(message.removeprefix("dgemma::moe_ffn: ")) from error


@library.register_fake("dgemma::moe_ffn")
def _moe_ffn_fake(input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(input)


@library.register_fake("dgemma::moe_ffn.out")
def _moe_ffn_out_fake(
    input: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    out: Tensor,
    workspace: Tensor,
) -> None:
    return None
