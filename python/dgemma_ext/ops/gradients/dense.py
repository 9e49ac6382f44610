"""A frozen dense product over weights of any format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dgemma_ext.ops.formats import QuantizedWeight
from dgemma_ext.ops.weights import linear as ops_linear


def linear(input: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """input [..., in] @ weight.T with the input's gradient: dx = dy @ weight, dequantized for that product alone.

    The forward over a quantized weight is `quantized_gemm.dense`; in float64 it is the product by the dequantized
    matrix.
    """
    if isinstance(weight, Tensor):
        return functional.linear(input, weight)
    found: Tensor = _QuantizedLinear.apply(input, weight)  # type: ignore[no-untyped-call]
    return found


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        if input.dtype == torch.float64:
            return functional.linear(input, weight.dequantized(torch.float64))
        return ops_linear(input, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor, None]:
        return output_grad @ ctx.weight.dequantized(output_grad.dtype), None
