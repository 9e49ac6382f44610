"""The mixture-of-experts feed-forward as one operator, from the router's choice to the combined output."""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma_ext.ops import description
from dgemma_ext.ops.operators import operator

_moe_ffn, _moe_ffn_out, _dense = operator("moe_ffn"), operator("moe_ffn.out"), operator("dense")


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
    if out is None and workspace is None:
        result: Tensor = _moe_ffn(input, expert_ids, expert_weights, gate_up, down)
        return result
    if out is None:
        out = torch.empty_like(input)
    _moe_ffn_out(input, expert_ids, expert_weights, gate_up, down, out=out, workspace=workspace)
    return out


def moe_ffn_workspace(input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> int:
    """Bytes of workspace that `moe_ffn` needs for arguments of these shapes and dtype; values are not looked at."""
    call = description.check("moe_ffn", (input, expert_ids, expert_weights, gate_up, down), {})
    return description.workspace_bytes(
        "moe_ffn", bfloat16=input.dtype == torch.bfloat16, cuda=input.is_cuda, **call.sizes
    )


def dense(input: Tensor, weight: Tensor) -> Tensor:
    """input @ weight.T, summed in fp32 and rounded once: [rows, out_features].

    Unlike torch's product its bits for a row depend on that row alone, not on how many rows there are. input is
    [rows, in_features], weight [out_features, in_features], both float32 or bfloat16 (on a GPU bfloat16, with features
    in multiples of 8). Raises ValueError naming an argument of another shape, dtype or device.
    """
    result: Tensor = _dense(input, weight)
    return result
