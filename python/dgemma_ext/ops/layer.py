"""What stands between a layer's products, each as one operator: a launch on a GPU, torch's operators on the CPU.

Order of operations and roundings are those of transformers' modeling_diffusion_gemma.py: norms in fp32 rounded once,
sums and products beside them rounded to the tensors' dtype one by one. Every row is computed by itself.

On a GPU: bfloat16, hidden sizes in multiples of eight up to 8,192, heads up to 512 wide. Every function raises
ValueError (or RuntimeError from the operator) naming an argument of another shape, dtype or device.
"""

from __future__ import annotations

import torch
from torch import Tensor, library
from torch.nn import functional

from dgemma_ext.ops import plain


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
    """Raw projections to what attention takes: queries and keys normalised and rotated, values normalised.

    query: [tokens, heads, head_dim]. key, value: [tokens, key heads, head_dim]; value None takes the raw keys. Weights
    of the norms are [head_dim], cosine and sine [tokens, head_dim]: each pair (i, i + head_dim / 2) is turned by its
    angle.
    """
    _check_rows("key", key, (query.shape[0], key.shape[1], query.shape[2]), query)
    _check_rows("cosine", cosine, (query.shape[0], query.shape[2]), query)
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.dgemma.normalise_heads(
        query, key, value, query_norm, key_norm, cosine, sine, epsilon
    )
    return result


def attention_residual(
    hidden: Tensor, attended: Tensor, attended_norm: Tensor, dense_norm: Tensor, sparse_norm: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """residual = hidden + norm(attended), and the inputs of the dense MLP and of the experts, its two norms.

    hidden, attended: [tokens, hidden_size]; weights: [hidden_size]. Returns three tensors like hidden.
    """
    _check_rows("attended", attended, tuple(hidden.shape), hidden)
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.dgemma.attention_residual(
        hidden, attended, attended_norm, dense_norm, sparse_norm, epsilon
    )
    return result


def gelu_product(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, two tensors of one shape."""
    _check_rows("up", up, tuple(gate.shape), gate)
    result: Tensor = torch.ops.dgemma.gelu_product(gate, up)
    return result


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
    """output = (residual + norm(norm(dense) + norm(sparse))) * scalar, and norm(output, next_norm).

    residual, dense, sparse: [tokens, hidden_size]; weights: [hidden_size]. next_norm is the weight of whatever norm
    comes next: the next layer's first, or the model's last. Returns the output and that norm of it.
    """
    _check_rows("dense", dense, tuple(residual.shape), residual)
    _check_rows("sparse", sparse, tuple(residual.shape), residual)
    result: tuple[Tensor, Tensor] = torch.ops.dgemma.layer_output(
        residual, dense, sparse, dense_norm, sparse_norm, norm, next_norm, scalar, epsilon
    )
    return result


def _check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != like.dtype or tensor.device != like.device:
        got = f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name}: got {got}, wants {list(shape)} of {like.dtype} on {like.device}")


# In torch's operators ----------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in fp32, rounded once to x's dtype. No 1 is added to the weight."""
    wide_weight = None if weight is None else weight.float()
    return functional.rms_norm(x.float(), x.shape[-1:], wide_weight, epsilon).to(x.dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine[:, None] + torch.cat((-second, first), dim=-1) * sine[:, None]


def _normalise_heads(
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


def _attention_residual(
    hidden: Tensor, attended: Tensor, attended_norm: Tensor, dense_norm: Tensor, sparse_norm: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    residual = hidden + rms_norm(attended, attended_norm, epsilon)
    return residual, rms_norm(residual, dense_norm, epsilon), rms_norm(residual, sparse_norm, epsilon)


def _gelu_product(gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(gate, approximate="tanh") * up


def _layer_output(
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
    ("normalise_heads", _normalise_heads),
    ("attention_residual", _attention_residual),
    ("gelu_product", _gelu_product),
    ("layer_output", _layer_output),
):
    plain.register(f"dgemma::{_name}", _function)


@library.register_fake("dgemma::normalise_heads")
def _normalise_heads_fake(query: Tensor, key: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(key)


@library.register_fake("dgemma::attention_residual")
def _attention_residual_fake(hidden: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(hidden), torch.empty_like(hidden)


@library.register_fake("dgemma::gelu_product")
def _gelu_product_fake(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@library.register_fake("dgemma::layer_output")
def _layer_output_fake(residual: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual), torch.empty_like(residual)
