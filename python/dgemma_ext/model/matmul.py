"""Matrix products over the rows of several requests: projections, gated MLPs and the router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional

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


# Rows of a product of torch's when tokens are encoded. The bits of a row depend on how many rows the product has, so
# every position is computed in the block of this many positions that it belongs to, whichever piece of a prompt the
# pass has: the cache's content is then a function of the tokens alone. The rows that only fill a block are lost, and
# a product of fewer rows is slower for each row. Processor seconds of encoding at the published width (three layers, 32
# experts, one thread of Zen 4 with bfloat16 dot products), with blocks of 64, of 128, and without blocks: 20 tokens
# 0.145, 0.220, 0.091; 50 tokens 0.171, 0.243, 0.150; 256 behind 150 0.822, 0.841, 0.638; 512 1.51, 1.42, 1.36.
ENCODE_BLOCK = 64


@dataclass(frozen=True)
class Matmul:
    """The products of one pass.

    counts: the number of rows of each request in turn. starts: for each of them the position of its first row where its
    tokens are encoded, None for a canvas.
    """

    mode: MatmulMode
    counts: tuple[int, ...]
    starts: tuple[int | None, ...]

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x [rows, in] @ weight.T. The product by a quantized weight is our own in every mode."""
        if not isinstance(weight, Tensor):
            return linear(x, weight)
        if self.mode is MatmulMode.INVARIANT:
            return grouped_gemm.dense(x, weight)
        return self._by_request(x, lambda rows: (linear(rows, weight),))[0]

    def gated_mlp(self, x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
        """down(gelu_tanh(gate x) * up x): the dense MLP of a layer, and of the self-conditioning."""
        if self.mode is MatmulMode.INVARIANT:
            return self.linear(gelu_product(self.linear(x, gate), self.linear(x, up)), down)
        return self._by_request(x, lambda rows: (linear(gelu_product(linear(rows, gate), linear(rows, up)), down),))[0]

    def route(
        self, x: Tensor, scale: Tensor, projection: Tensor, per_expert_scale: Tensor, top_k: int, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """`ops.router.route`, by request where its scores come from torch's product."""
        parameters = (scale, projection, per_expert_scale, top_k, epsilon)
        ids, weights = self._by_request(x, lambda rows: route(rows, *parameters))
        return ids, weights

    def _by_request(self, x: Tensor, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Results of `compute`, which has a row for each of its argument, for all rows. With PER_REQUEST its arguments
        are the rows of one canvas, or a block of tokens to encode."""
        if self.mode is not MatmulMode.PER_REQUEST:
            return compute(x)
        parts = [
            compute(rows) if start is None else _in_blocks(rows, start, compute)
            for rows, start in zip(x.split(self.counts), self.starts, strict=True)
        ]
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def _in_blocks(x: Tensor, start: int, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`compute` for tokens at positions start .. start + n - 1, x [n, in]: each row is at its place in a block of
    ENCODE_BLOCK rows, which are zeros beyond x."""
    before = start % ENCODE_BLOCK
    after = -(before + x.shape[0]) % ENCODE_BLOCK
    blocks = functional.pad(x, (0, 0, before, after)).split(ENCODE_BLOCK)
    results = list(zip(*map(compute, blocks), strict=True))
    joined = [each[0] if len(each) == 1 else torch.cat(each) for each in results]
    return tuple(each[before : before + x.shape[0]] for each in joined)
