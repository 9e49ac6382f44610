"""Attention of a block with gradients of queries, keys and values, those of the prefix too.

Forward are the kernels of `ops.block_attention`; backward torch's scaled_dot_product_attention computes the block again
and differentiates it. At 512 positions before a canvas of 256 attention is 2 to 7 % of a layer's arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dgemma_ext.ops import block_attention
from dgemma_ext.ops.plain.block_attention import canvas_visibility, causal_visibility, gathered

_KERNEL_DTYPES = (torch.bfloat16, torch.float32)


def canvas_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    slot: Tensor,
    prefix_length: Tensor,
    window: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """`block_attention.canvas_attention` with gradients of the five operands; float64 in plain torch."""
    operands = (query, key, value, prefix_key, prefix_value, slot, prefix_length)
    found: Tensor = _Attention.apply(*operands, None, False, window, scale)  # type: ignore[no-untyped-call]
    return found


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    slot: Tensor,
    prefix_length: Tensor,
    spans: Tensor | None = None,
    window: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """`block_attention.causal_attention` with gradients of the five operands; float64 in plain torch."""
    operands = (query, key, value, prefix_key, prefix_value, slot, prefix_length)
    found: Tensor = _Attention.apply(*operands, spans, True, window, scale)  # type: ignore[no-untyped-call]
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        slot: Tensor,
        prefix_length: Tensor,
        spans: Tensor | None,
        causal: bool,
        window: int,
        scale: float,
    ) -> Tensor:
        tensors = [t.contiguous() for t in (query, key, value, prefix_key, prefix_value)]
        operands = (tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], slot, prefix_length)
        ctx.save_for_backward(*operands, spans)
        ctx.causal, ctx.window, ctx.scale = causal, window, scale
        if query.dtype not in _KERNEL_DTYPES:
            return _in_torch(*operands, spans, causal, window, scale)
        if causal:
            return block_attention.causal_attention(*operands, spans=spans, window=window, scale=scale)
        return block_attention.canvas_attention(*operands, window=window, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, slot, prefix_length, spans = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:5]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, wanted, strict=True)]
            operands = (leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], slot, prefix_length)
            again = _in_torch(*operands, spans, ctx.causal, ctx.window, ctx.scale)
        needed = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
        grads = iter(torch.autograd.grad(again, needed, output_grad))
        return (*(next(grads) if need else None for need in wanted), *(None,) * 6)


def _in_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    slot: Tensor,
    prefix_length: Tensor,
    spans: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
) -> Tensor:
    """The same attention by scaled_dot_product_attention."""
    if causal:
        first, end = causal_visibility(query, prefix_length, spans, window)
    else:
        first, end = canvas_visibility(query, prefix_length, None, window)
    keys, values, seen, _ = gathered(query, key, value, prefix_key, prefix_value, slot, prefix_length, None, first, end)
    attended = functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=seen[:, None],
        scale=scale,
        enable_gqa=True,
    )
    return attended.transpose(1, 2)
