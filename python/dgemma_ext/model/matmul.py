"""Matrix products over the rows of several requests: projections, gated MLPs, the router and the experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext.checkpoint import Weight
from dgemma_ext.model.adapted_experts import adapted_experts, adapts_experts
from dgemma_ext.model.low_rank import NO_FACTORS, LowRank, LowRanks, Side
from dgemma_ext.ops import grouped_gemm
from dgemma_ext.ops.layer import gelu_product
from dgemma_ext.ops.router import choose, route, router_input
from dgemma_ext.ops.weights import experts, linear


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
    """The products of one pass over a layer's weights, which are called by their attributes of LayerWeights.

    counts: the number of rows of each request in turn. starts: for each of them the position of its first row where its
    tokens are encoded, None for a canvas. side: the low-rank factors beside the weights; None where no row has any.
    """

    mode: MatmulMode
    counts: tuple[int, ...]
    starts: tuple[int | None, ...]
    side: Side | None = None

    def linear(self, x: Tensor, weight: Weight, name: str) -> Tensor:
        """x [rows, in] @ weight.T, and what stands beside the weight. The product by a quantized weight is our own in
        every mode."""
        is_plain = isinstance(weight, Tensor)
        if self.mode is MatmulMode.PER_REQUEST and (is_plain or self._has_side(name)):
            return self._by_request(x, lambda factors, rows: (_linear(rows, weight, factors.get(name)),))[0]
        if self.mode is MatmulMode.INVARIANT and isinstance(weight, Tensor):
            y = grouped_gemm.dense(x, weight)
        else:
            y = linear(x, weight)
        return self._with_side(y, x, name) if self._has_side(name) else y

    def gated_mlp(self, x: Tensor, gate: Weight, up: Weight, down: Weight, prefix: str = "") -> Tensor:
        """down(gelu_tanh(gate x) * up x): the dense MLP of a layer, and of the self-conditioning. prefix: of the names
        of its weights."""
        gate_name, up_name, down_name = (f"{prefix}{name}_proj" for name in ("gate", "up", "down"))
        if self.mode is not MatmulMode.PER_REQUEST:
            product = gelu_product(self.linear(x, gate, gate_name), self.linear(x, up, up_name))
            return self.linear(product, down, down_name)

        def mlp(factors: LowRanks, rows: Tensor) -> tuple[Tensor, ...]:
            opened = _linear(rows, gate, factors.get(gate_name))
            product = gelu_product(opened, _linear(rows, up, factors.get(up_name)))
            return (_linear(product, down, factors.get(down_name)),)

        return self._by_request(x, mlp)[0]

    def route(
        self, x: Tensor, scale: Tensor, projection: Tensor, per_expert_scale: Tensor, top_k: int, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """`ops.router.route`, by request where its scores come from torch's product."""
        name = "router_proj"

        def by_kernel(rows: Tensor) -> tuple[Tensor, Tensor]:
            return route(rows, scale, projection, per_expert_scale, top_k, epsilon)

        def in_parts(rows: Tensor, product: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            return choose(product(router_input(rows, scale, epsilon)), per_expert_scale, top_k)

        if self.mode is not MatmulMode.PER_REQUEST:
            if not self._has_side(name):
                return by_kernel(x)
            return in_parts(x, lambda rows: self.linear(rows, projection, name))

        def of_request(factors: LowRanks, rows: Tensor) -> tuple[Tensor, ...]:
            if name not in factors:
                return by_kernel(rows)
            return in_parts(rows, lambda normed: _linear(normed, projection, factors[name]))

        ids, weights = self._by_request(x, of_request)
        return ids, weights

    def experts(
        self,
        x: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        gate_up: Weight,
        down: Weight,
        activations: str | None = None,
    ) -> Tensor:
        """`ops.weights.experts`, with what stands beside both weights."""
        by_request = () if self.side is None else self.side.by_request
        adapted = [adapts_experts(factors) for factors in by_request]
        if not any(adapted):
            return experts(x, expert_ids, expert_weights, gate_up, down, activations)
        split = (tensor.split(self.counts) for tensor in (x, expert_ids, expert_weights))
        parts = []
        for factors, rows, ids, weights in zip(by_request, *split, strict=True):
            if adapts_experts(factors):
                parts.append(adapted_experts(rows, ids, weights, gate_up, down, factors))
            else:
                parts.append(experts(rows, ids, weights, gate_up, down, activations))
        return torch.cat(parts)

    def _has_side(self, name: str) -> bool:
        return self.side is not None and self.side.has(name)

    def _with_side(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        """y, one product of all rows of x, and what stands beside its weight."""
        assert self.side is not None
        by_canvas, parts, begin = self.side.by_canvas, list[tuple[slice, LowRanks]](), 0
        if by_canvas is not None:
            rows = sum(count for count, start in zip(self.counts, self.starts, strict=True) if start is None)
            parts.append((slice(rows), by_canvas))
        for count, start, factors in zip(self.counts, self.starts, self.side.by_request, strict=True):
            if start is not None or by_canvas is None:
                parts.append((slice(begin, begin + count), factors))
            begin += count
        for where, factors in parts:
            beside = factors.get(name)
            if beside is not None and self.mode is MatmulMode.INVARIANT:
                beside.add_by(grouped_gemm.dense, y[where], x[where])
            elif beside is not None:
                beside.add_to(y[where], x[where])
        return y

    def _by_request(self, x: Tensor, compute: Callable[[LowRanks, Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Results of `compute`, which has a row for each of its rows, for all rows. Its arguments are what stands
        beside the weights for a request, and the rows of its canvas or a block of its tokens to encode."""
        by_request = (NO_FACTORS,) * len(self.counts) if self.side is None else self.side.by_request
        parts = []
        for rows, start, factors in zip(x.split(self.counts), self.starts, by_request, strict=True):
            of_request = partial(compute, factors)
            parts.append(of_request(rows) if start is None else _in_blocks(rows, start, of_request))
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def _linear(x: Tensor, weight: Weight, factors: LowRank | None) -> Tensor:
    y = linear(x, weight)
    return y if factors is None else factors.add_to(y, x)


def _in_blocks(x: Tensor, start: int, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`compute` for tokens at positions start .. start + n - 1, x [n, in]: each row is at its place in a block of
    ENCODE_BLOCK rows, which are zeros beyond x."""
    before = start % ENCODE_BLOCK
    after = -(before + x.shape[0]) % ENCODE_BLOCK
    blocks = functional.pad(x, (0, 0, before, after)).split(ENCODE_BLOCK)
    results = list(zip(*map(compute, blocks), strict=True))
    joined = [each[0] if len(each) == 1 else torch.cat(each) for each in results]
    return tuple(each[before : before + x.shape[0]] for each in joined)
