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


def gated_mlp(x: torch.Tensor, gate: Weight, up: Weight, down: Weight) -> torch.Tensor:
    """down(gelu_tanh(gate x) * up x): the dense MLP of a layer, and self-conditioning's."""
    return linear(gelu_product(linear(x, gate), linear(x, up)), down)


__all__ = ["gated_mlp", "project_qkv", "rms_norm", "rotary_tables"]


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised, rotated queries [L, heads, head_dim], keys and values [L, key heads, head_dim], from x [L, hidden].

    On full layers values are the key projection before its norm, its scale and the rotation.
    """
    heads = (x.shape[0], -1, layer.head_dim)
    query = linear(x, weights.q_proj).view(heads)
    key = linear(x, weights.k_proj).view(heads)
    value = None if weights.v_proj is None else linear(x, weights.v_proj).view(heads)
    return normalise_heads(query, key, value, weights.q_norm, weights.k_norm, *tables, epsilon)
