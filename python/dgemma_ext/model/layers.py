"""The first part of a layer: query, key and value projections with their norms, and rotary embedding.

Both follow transformers' modeling_diffusion_gemma.py in the order of operations and the roundings, because ties in
bfloat16 decide which experts are chosen and which token is the draft.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dgemma_ext.checkpoint import LayerConfig, ModelConfig, RopeConfig
from dgemma_ext.model.matmul import Matmul
from dgemma_ext.model.weights import LayerWeights
from dgemma_ext.ops.layer import normalise_heads

# A layer's rope and head dimension → cosines and sines, [positions, head_dim] each.
RotaryTables = dict[tuple[RopeConfig, int], tuple[Tensor, Tensor]]


@cache
def _inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    return rope.inverse_frequencies(head_dim).to(device)


def rotary_table(rope: RopeConfig, head_dim: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for int positions [n], each [n, head_dim], computed in fp32 and rounded once to `dtype`."""
    angles = positions[:, None].float() * _inverse_frequencies(rope, head_dim, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> RotaryTables:
    """The tables of int positions [n] for every kind of layer."""
    return {kind: rotary_table(*kind, positions, dtype) for kind in rotary_kinds(config)}


def rotary_kinds(config: ModelConfig) -> list[tuple[RopeConfig, int]]:
    """The different pairs of rope and head dimension among the layers."""
    return list(dict.fromkeys((layer.rope, layer.head_dim) for layer in config.layers))


def project_qkv(
    x: Tensor,
    weights: LayerWeights,
    layer: LayerConfig,
    table: tuple[Tensor, Tensor],
    epsilon: float,
    matmul: Matmul,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised, rotated queries [n, heads, head_dim], keys and values [n, key heads, head_dim], from x [n, hidden].

    `table` has a row for each row of x. On full layers the values are the key projection before its norm, its scale
    and the rotation.
    """
    heads = (x.shape[0], -1, layer.head_dim)
    query = matmul.linear(x, weights.q_proj, "q_proj").view(heads)
    key = matmul.linear(x, weights.k_proj, "k_proj").view(heads)
    value = None if weights.v_proj is None else matmul.linear(x, weights.v_proj, "v_proj").view(heads)
    return normalise_heads(query, key, value, weights.q_norm, weights.k_norm, *table, epsilon)
