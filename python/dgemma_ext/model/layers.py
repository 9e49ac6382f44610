"""What a layer has beside its grouped GEMM and its attention: rotary embedding, projections, dense MLP.

Each follows transformers' modeling_diffusion_gemma.py in its order of operations and its roundings, because ties in
bfloat16 decide which experts are chosen and which token is the draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch

from dgemma_ext.checkpoint.config import LayerConfig, RopeConfig
from dgemma_ext.checkpoint.reading import Weight
from dgemma_ext.model.weights import LayerWeights
from dgemma_ext.ops import grouped_gemm
from dgemma_ext.ops.layer import gelu_product, normalise_heads, rms_norm
from dgemma_ext.ops.quantized_gemm import linear
from dgemma_ext.ops.router import route


class Products(Enum):
    """How dense products treat rows of several requests. The bits of torch's product for a row depend on how many rows
    there are, so what a request's bits may depend on is a choice."""

    APART = "apart"  # torch's, one for the rows of each request: the CPU's, where it costs nothing
    TOGETHER = "together"  # torch's, one for all rows: a GPU's
    INVARIANT = "invariant"  # our own, one for all rows, whose bits for a row are that row's alone


@dataclass(frozen=True)
class Rows:
    """Whose the rows of a pass are: `counts` of them belong to each request in turn."""

    counts: tuple[int, ...]
    products: Products

    def dense(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """x [rows, in] @ weight.T. The product with a quantized weight is our own in any case."""
        if isinstance(weight, torch.Tensor):
            if self.products is Products.INVARIANT:
                return grouped_gemm.dense(x, weight)
            if self._apart:
                return torch.cat([linear(rows, weight) for rows in x.split(self.counts)])
        return linear(x, weight)

    def gated_mlp(self, x: torch.Tensor, gate: Weight, up: Weight, down: Weight) -> torch.Tensor:
        """down(gelu_tanh(gate x) * up x): the dense MLP of a layer, and self-conditioning's."""
        return self.dense(gelu_product(self.dense(x, gate), self.dense(x, up)), down)

    def route(self, x: torch.Tensor, *router: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """`ops.router.route`, whose scores are torch's product on the CPU."""
        if not self._apart:
            return route(x, *router)
        ids, weights = zip(*(route(rows, *router) for rows in x.split(self.counts)), strict=True)
        return torch.cat(ids), torch.cat(weights)

    @property
    def _apart(self) -> bool:
        return self.products is Products.APART and len(self.counts) > 1


__all__ = ["Products", "Rows", "project_qkv", "rms_norm", "rotary_tables"]


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
    whose: Rows,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised, rotated queries [n, heads, head_dim], keys and values [n, key heads, head_dim], from x [n, hidden],
    `tables` having a row for each.

    On full layers values are the key projection before its norm, its scale and the rotation.
    """
    heads = (x.shape[0], -1, layer.head_dim)
    query = whose.dense(x, weights.q_proj).view(heads)
    key = whose.dense(x, weights.k_proj).view(heads)
    value = None if weights.v_proj is None else whose.dense(x, weights.v_proj).view(heads)
    return normalise_heads(query, key, value, weights.q_norm, weights.k_norm, *tables, epsilon)
