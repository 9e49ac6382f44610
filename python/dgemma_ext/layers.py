"""What a layer has beside its grouped GEMM and its attention: rotary embedding, projections, dense MLP.

Each follows transformers' modeling_diffusion_gemma.py in its order of operations and its roundings, because ties in
bfloat16 decide which experts are chosen and which token is the draft.
"""

from __future__ import annotations

from functools import cache

import torch

from dgemma_ext.config import LayerConfig, RopeConfig
from dgemma_ext.loading import Weight
from dgemma_ext.ops.layer import gelu_product, normalise_heads, rms_norm
from dgemma_ext.ops.quantized_gemm import linear
from dgemma_ext.weights import LayerWeights


def dense(x: torch.Tensor, weight: Weight, requests: int = 1) -> torch.Tensor:
    """x @ weight.T for x [requests * L, in]: on the CPU request by request, because the bits of torch's product for a
    row depend on how many rows there are, and a request's must not depend on its batch. On a GPU in one product."""
    if requests == 1 or x.device.type != "cpu":
        return linear(x, weight)
    return torch.cat([linear(rows, weight) for rows in x.chunk(requests)])


def gated_mlp(x: torch.Tensor, gate: Weight, up: Weight, down: Weight, requests: int = 1) -> torch.Tensor:
    """down(gelu_tanh(gate x) * up x): the dense MLP of a layer, and self-conditioning's. x: [requests * L, in]."""
    return dense(gelu_product(dense(x, gate, requests), dense(x, up, requests)), down, requests)


__all__ = ["dense", "gated_mlp", "project_qkv", "rms_norm", "rotary_tables"]


@cache
def _inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> torch.Tensor:
    return rope.inverse_frequencies(head_dim).to(device)


def rotary_tables(
    rope: RopeConfig, head_dim: int, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for int positions [L], each [L, head_dim]: in fp32, rounded once to `dtype`."""
    angles = positions[:, None].float() * _inverse_frequencies(rope, head_dim, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def project_qkv(
    x: torch.Tensor,
    weights: LayerWeights,
    layer: LayerConfig,
    tables: tuple[torch.Tensor, torch.Tensor],
    epsilon: float,
    requests: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised, rotated queries [n, heads, head_dim], keys and values [n, key heads, head_dim], from x [n, hidden]:
    the rows of all requests one after the other, as many of each. `tables` have a row for each.

    On full layers values are the key projection before its norm, its scale and the rotation.
    """
    heads = (x.shape[0], -1, layer.head_dim)
    query = dense(x, weights.q_proj, requests).view(heads)
    key = dense(x, weights.k_proj, requests).view(heads)
    value = None if weights.v_proj is None else dense(x, weights.v_proj, requests).view(heads)
    return normalise_heads(query, key, value, weights.q_norm, weights.k_norm, *tables, epsilon)
