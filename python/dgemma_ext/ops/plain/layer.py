"""What stands between a layer's products, in torch's operators: a GPU's form without kernels.

On the CPU `gelu_product` and `rms_norm` are these. The kernels of the others (csrc/layer) have the same bits there, in
half of the time and less; tests compare.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext.ops.plain.registration import register


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in fp32, rounded once to x's dtype. No 1 is added to the weight."""
    wide_weight = None if weight is None else weight.float()
    return functional.rms_norm(x.float(), x.shape[-1:], wide_weight, epsilon).to(x.dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine[:, None] + torch.cat((-second, first), dim=-1) * sine[:, None]


def normalise_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    query_norm: Tensor,
    key_norm: Tensor,
    cosine: Tensor,
    sine: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _rotate(rms_norm(query, query_norm, epsilon), cosine, sine),
        _rotate(rms_norm(key, key_norm, epsilon), cosine, sine),
        rms_norm(key if value is None else value, None, epsilon),
    )


def attention_residual(
    hidden: Tensor, attended: Tensor, attended_norm: Tensor, dense_norm: Tensor, sparse_norm: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    residual = hidden + rms_norm(attended, attended_norm, epsilon)
    return residual, rms_norm(residual, dense_norm, epsilon), rms_norm(residual, sparse_norm, epsilon)


def gelu_product(gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(gate, approximate="tanh") * up


def layer_output(
    residual: Tensor,
    dense: Tensor,
    sparse: Tensor,
    dense_norm: Tensor,
    sparse_norm: Tensor,
    norm: Tensor,
    next_norm: Tensor,
    scalar: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    combined = rms_norm(dense, dense_norm, epsilon) + rms_norm(sparse, sparse_norm, epsilon)
    output = (residual + rms_norm(combined, norm, epsilon)) * scalar
    return output, rms_norm(output, next_norm, epsilon)


for _name, _function in (
    ("rms_norm", rms_norm),
    ("normalise_heads", normalise_heads),
    ("attention_residual", attention_residual),
    ("gelu_product", gelu_product),
    ("layer_output", layer_output),
):
    register(f"dgemma::{_name}", _function)
