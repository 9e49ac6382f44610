"""The experts with gradients of input, routing weights and low-rank factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dgemma_ext.ops import weights as ops_weights
from dgemma_ext.ops.formats import QuantizedWeight
from dgemma_ext.ops.gradients.grouped_products import outer_product, product, sort_by_expert, transposed_product

_KERNEL_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class ExpertFactors:
    """Low-rank factors of one matrix of every expert: its weight is W + scale * b @ a.

    a: [experts, rank, in]; b: [experts, out, rank]; both of the input's dtype.
    """

    a: Tensor
    b: Tensor
    scale: float


def moe_ffn(
    input: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    gate_up_factors: ExpertFactors | None = None,
    down_factors: ExpertFactors | None = None,
) -> Tensor:
    """`ops.weights.experts` with gradients; the weights get none.

    Without factors the forward is that operator's kernel. With them it is made of grouped products: for row x of expert
    e, low-rank terms are two products each, so that W + b a never exists::

        gate, up = W1 x + s1 b1 (a1 x)
        h = gelu_tanh(gate) * up
        out += w * (W2 h + s2 b2 (a2 h))

    Backward, with y the gradient of `out` and d = W2.T y + s2 a2.T b2.T y::

        dw = <h, d>      dh = w d      d gate = dh * up * gelu_tanh'(gate)      d up = dh * gelu_tanh(gate)
        dx = W1.T g + s1 a1.T b1.T g, with g = (d gate, d up); slots are summed in order
        db1 = s1 g (a1 x).T      da1 = s1 b1.T g x.T      db2 = s2 w y (a2 h).T      da2 = s2 w b2.T y h.T

    Args:
        input: [tokens, hidden_size], float32 or bfloat16; float64 in plain torch.
        expert_ids: [tokens, top_k], integers in [0, experts).
        expert_weights: [tokens, top_k], float32 (float64 with float64).
        gate_up, down: [experts, 2 * expert_size, hidden_size] and [experts, hidden_size, expert_size], gate rows first;
            both tensors or both quantized.

    Returns:
        [tokens, hidden_size], dtype of input.

    Raises:
        ValueError: as `ops.weights.experts`.
    """
    one, two = gate_up_factors, down_factors
    a1, b1 = (None, None) if one is None else (one.a, one.b)
    a2, b2 = (None, None) if two is None else (two.a, two.b)
    scales = (0.0 if one is None else one.scale, 0.0 if two is None else two.scale)
    operands = (input, expert_ids, expert_weights, a1, b1, a2, b2, gate_up, down, scales)
    found: Tensor = _Experts.apply(*operands)  # type: ignore[no-untyped-call]
    return found


@dataclass
class _Sorted:
    """A call's rows in the order of their experts, and what the forward makes of them.

    Gate and up, and sums of a base's product and a low-rank one, are float32 at least: each rounding to bfloat16 that
    is saved is a tenth of what the tests allow.
    """

    token: Tensor  # of each row
    order: Tensor  # of each row its place in [tokens * top_k]
    ends: Tensor
    x: Tensor
    gate: Tensor
    up: Tensor
    h: Tensor
    low_x: Tensor | None  # a1 x
    low_h: Tensor | None  # a2 h


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        gate_up: Tensor | QuantizedWeight,
        down: Tensor | QuantizedWeight,
        scales: tuple[float, float],
    ) -> Tensor:
        ctx.save_for_backward(input, expert_ids, expert_weights, a1, b1, a2, b2)
        ctx.frozen, ctx.scales = (gate_up, down), scales
        if a1 is None and a2 is None and input.dtype in _KERNEL_DTYPES:
            ids = expert_ids.to(torch.int32).contiguous()
            return ops_weights.experts(input.contiguous(), ids, expert_weights.contiguous(), gate_up, down)
        rows = _recomputed(input, expert_ids, gate_up, a1, b1, a2, scales[0])
        y = product(rows.h, down, rows.ends)
        if b2 is not None and rows.low_h is not None:
            y = y.to(expert_weights.dtype) + scales[1] * product(rows.low_h, b2, rows.ends)
        weighted = expert_weights.reshape(-1, 1) * _unsorted(y, rows.order)
        return weighted.unflatten(0, expert_ids.shape).sum(1).to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        input, expert_ids, expert_weights, a1, b1, a2, b2 = ctx.saved_tensors
        (gate_up, down), (scale1, scale2) = ctx.frozen, ctx.scales
        dtype, wide = input.dtype, torch.promote_types(input.dtype, torch.float32)
        rows = _recomputed(input, expert_ids, gate_up, a1, b1, a2, scale1)
        ends = rows.ends
        weight = expert_weights.reshape(-1)[rows.order][:, None]
        # A gradient of a mean is expanded from one number, and grouped_mm wants rows.
        y_grad = output_grad.contiguous()[rows.token]
        a1_grad = b1_grad = a2_grad = b2_grad = None

        h_grad = transposed_product(y_grad, down, ends)
        if a2 is not None:
            assert rows.low_h is not None
            low_grad = scale2 * transposed_product(y_grad, b2, ends)
            h_grad = h_grad.to(wide) + transposed_product(low_grad, a2, ends)
            b2_grad = outer_product((scale2 * weight * y_grad).to(dtype), rows.low_h, ends)
            a2_grad = outer_product((weight * low_grad).to(dtype), rows.h, ends)
        by_slot = (rows.h.to(wide) * h_grad).sum(-1)
        weights_grad = _unsorted(by_slot, rows.order).view(expert_weights.shape)

        h_grad = weight * h_grad
        gate_grad = torch.ops.aten.gelu_backward(h_grad * rows.up, rows.gate, approximate="tanh")
        up_grad = h_grad * functional.gelu(rows.gate, approximate="tanh")
        grad = torch.cat((gate_grad, up_grad), dim=-1).to(dtype)
        x_grad = transposed_product(grad, gate_up, ends)
        if a1 is not None:
            assert rows.low_x is not None
            low_grad = scale1 * transposed_product(grad, b1, ends)
            x_grad = x_grad.to(wide) + transposed_product(low_grad, a1, ends)
            b1_grad = outer_product(scale1 * grad, rows.low_x, ends)
            a1_grad = outer_product(low_grad, rows.x, ends)
        by_token = _unsorted(x_grad, rows.order).unflatten(0, expert_ids.shape)
        input_grad = by_token.sum(1, dtype=wide).to(dtype)
        return input_grad, None, weights_grad, a1_grad, b1_grad, a2_grad, b2_grad, None, None, None


def _recomputed(
    input: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor | QuantizedWeight,
    a1: Tensor | None,
    b1: Tensor | None,
    a2: Tensor | None,
    scale: float,
) -> _Sorted:
    wide = torch.promote_types(input.dtype, torch.float32)
    order, ends = sort_by_expert(expert_ids, gate_up.shape[0])
    token = order // expert_ids.shape[1]
    x = input[token]
    grown = product(x, gate_up, ends)
    low_x = low_h = None
    if a1 is not None and b1 is not None:
        low_x = product(x, a1, ends)
        grown = grown.to(wide) + scale * product(low_x, b1, ends)
    gate, up = grown.to(wide).chunk(2, dim=-1)
    h = (functional.gelu(gate, approximate="tanh") * up).to(input.dtype)
    if a2 is not None:
        low_h = product(h, a2, ends)
    return _Sorted(token, order, ends, x, gate, up, h, low_x, low_h)


def _unsorted(rows: Tensor, order: Tensor) -> Tensor:
    """Rows of a sorted call at their places in [tokens * top_k]."""
    out = torch.empty_like(rows)
    out[order] = rows
    return out
