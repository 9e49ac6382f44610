"""What a layer has beside its grouped GEMM and its attention: norms, rotary embedding, dense MLP, router.

Each follows transformers' modeling_diffusion_gemma.py in its order of operations and its roundings, because ties in
bfloat16 decide which experts are chosen and which token is the draft.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from dgemma_ext.config import LayerConfig, RopeConfig
from dgemma_ext.weights import LayerWeights


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, in fp32, rounded once to x's dtype. No 1 is added to the weight."""
    wide_weight = None if weight is None else weight.float()
    return functional.rms_norm(x.float(), x.shape[-1:], wide_weight, epsilon).to(x.dtype)


def gated_mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """down(gelu_tanh(gate x) * up x): the dense MLP of a layer, and self-conditioning's."""
    hidden = functional.gelu(functional.linear(x, gate), approximate="tanh") * functional.linear(x, up)
    return functional.linear(hidden, down)


@cache
def _inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> torch.Tensor:
    return rope.inverse_frequencies(head_dim).to(device)


def rotary_tables(
    rope: RopeConfig, head_dim: int, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for int positions [..., L], each [..., L, 1, head_dim]: in fp32, rounded once to `dtype`."""
    angles = positions[..., None].float() * _inverse_frequencies(rope, head_dim, positions.device)
    angles = torch.cat((angles, angles), dim=-1)[..., None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns each pair (i, i + head_dim / 2) of x [B, L, heads, head_dim] by its position's angle."""
    cosine, sine = tables
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def project_qkv(
    x: torch.Tensor,
    weights: LayerWeights,
    layer: LayerConfig,
    tables: tuple[torch.Tensor, torch.Tensor],
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised, rotated queries [B, L, heads, head_dim], keys and values [B, L, key heads, head_dim].

    On full layers values are the key projection before its norm, its scale and the rotation.
    """
    heads = (*x.shape[:-1], -1, layer.head_dim)
    query = functional.linear(x, weights.q_proj).view(heads)
    raw_key = functional.linear(x, weights.k_proj).view(heads)
    raw_value = raw_key if weights.v_proj is None else functional.linear(x, weights.v_proj).view(heads)
    return (
        rotate(rms_norm(query, weights.q_norm, epsilon), tables),
        rotate(rms_norm(raw_key, weights.k_norm, epsilon), tables),
        rms_norm(raw_value, None, epsilon),
    )
