"""The matrix products of a pass: projections, gated MLPs and the router, over rows of several requests."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from dgemma_ext.checkpoint import Weight
from dgemma_ext.ops import grouped_gemm
from dgemma_ext.ops.layer import gelu_product
from dgemma_ext.ops.quantized_gemm import linear
from dgemma_ext.ops.router import route


class MatmulMode(Enum):
    """May results depend on the batch? The bits that torch's product gives a row depend on how many rows there are."""

    PER_REQUEST = "per request"  # torch's product, one for the rows of each request: on the CPU, where it costs nothing
    BATCHED = "batched"  # torch's product, one for all rows: on a GPU
    INVARIANT = "invariant"  # our own product, one for all rows; the bits of a row do not depend on the others


@dataclass(frozen=True)
class Matmul:
    """The products of one pass, whose rows belong to requests in turn: `counts` rows each."""

    mode: MatmulMode
    counts: tuple[int, ...]

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x [rows, in] @ weight.T. A quantized weight has our own product in every mode."""
        if isinstance(weight, Tensor):
            if self.mode is MatmulMode.INVARIANT:
                return grouped_gemm.dense(x, weight)
            if self._splits:
                return torch.cat([linear(rows, weight) for rows in x.split(self.counts)])
        return linear(x, weight)

    def gated_mlp(self, x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
        """down(gelu_tanh(gate x) * up x): a layer's dense MLP, and the one of the self-conditioning."""
        return self.linear(gelu_product(self.linear(x, gate), self.linear(x, up)), down)

    def route(
        self, x: Tensor, scale: Tensor, projection: Tensor, per_expert_scale: Tensor, top_k: int, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """`ops.router.route`: the scores are torch's product on the CPU."""
        if not self._splits:
            return route(x, scale, projection, per_expert_scale, top_k, epsilon)
        parts = [route(rows, scale, projection, per_expert_scale, top_k, epsilon) for rows in x.split(self.counts)]
        ids, weights = zip(*parts, strict=True)
        return torch.cat(ids), torch.cat(weights)

    @property
    def _splits(self) -> bool:
        return self.mode is MatmulMode.PER_REQUEST and len(self.counts) > 1
