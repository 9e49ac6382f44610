"""Matrix products over the rows of several requests: projections, gated MLPs and the router."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from dgemma_ext.checkpoint import Weight
from dgemma_ext.ops import grouped_gemm
from dgemma_ext.ops.layer import gelu_product
from dgemma_ext.ops.router import route
from dgemma_ext.ops.weights import linear


class MatmulMode(Enum):
    """May results depend on the batch? The bits that torch's product gives a row depend on the number of rows."""

    PER_REQUEST = "per request"  # one torch product for each request; used on the CPU, where it costs nothing
    BATCHED = "batched"  # one torch product for all rows; used on a GPU
    INVARIANT = "invariant"  # one product of our own for all rows, in which a row's bits do not depend on the others


@dataclass(frozen=True)
class Matmul:
    """The products of one pass. `counts`: the number of rows of each request in turn."""

    mode: MatmulMode
    counts: tuple[int, ...]

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x [rows, in] @ weight.T. The product by a quantized weight is our own in every mode."""
        if isinstance(weight, Tensor):
            if self.mode is MatmulMode.INVARIANT:
                return grouped_gemm.dense(x, weight)
            if self._splits:
                return torch.cat([linear(rows, weight) for rows in x.split(self.counts)])
        return linear(x, weight)

    def gated_mlp(self, x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
        """down(gelu_tanh(gate x) * up x): the dense MLP of a layer, and of the self-conditioning."""
        return self.linear(gelu_product(self.linear(x, gate), self.linear(x, up)), down)

    def route(
        self, x: Tensor, scale: Tensor, projection: Tensor, per_expert_scale: Tensor, top_k: int, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """`ops.router.route`, split by request where its scores come from torch's product."""
        if not self._splits:
            return route(x, scale, projection, per_expert_scale, top_k, epsilon)
        parts = [route(rows, scale, projection, per_expert_scale, top_k, epsilon) for rows in x.split(self.counts)]
        ids, weights = zip(*parts, strict=True)
        return torch.cat(ids), torch.cat(weights)

    @property
    def _splits(self) -> bool:
        return self.mode is MatmulMode.PER_REQUEST and len(self.counts) > 1
