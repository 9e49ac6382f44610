"""Cases of block attention: their tensors, and the oracle's results; rows that must not be read are NaN."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from bounds import assert_close
from dgemma_ext.ops import block_attention
from reference import block_attention as reference

NAN = float("nan")
SENTINEL = 777.0  # exact in bfloat16
W = 24  # the window of most cases
# Orders of summing for the low-precision result that the element-wise bound is made from; with many elements one
# matrix product and one plain sum are enough.
ORDERS = 8
ORDERS_OF_LARGE = 2
LARGE = 10_000

Spans = list[tuple[int, int]]


@dataclass
class Request:
    """One request: `prefix` positions in the cache, `rows` in the block; `slot` -1 is skipped."""

    prefix: int
    rows: int
    slot: int = 0
    spans: Spans = field(default_factory=list)


@dataclass
class Case:
    requests: list[Request]
    query_heads: int = 4
    key_heads: int = 2
    head_dim: int = 32
    window: int = 0
    capacity: int = 64
    block: int = 0  # rows of the tensors, at least the longest request
    causal: bool = False
    scale: float = 1.0


class Built:
    """The tensors of a case. Padding rows of the block, and cache rows that hold no position, are NaN.

    `keys[b]` and `values[b]` are [P + n, key heads, head dim]: all that was ever computed for request b.
    """

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case = case
        batch, heads, dim = len(case.requests), case.key_heads, case.head_dim
        block = max([case.block, *(r.rows for r in case.requests)])
        slots = max([1, *(r.slot + 1 for r in case.requests)])
        self.query = torch.full((batch, block, case.query_heads, dim), NAN, dtype=dtype)
        self.key = torch.full((batch, block, heads, dim), NAN, dtype=dtype)
        self.value = self.key.clone()
        self.prefix_key = torch.full((slots, case.capacity, heads, dim), NAN, dtype=dtype)
        self.prefix_value = self.prefix_key.clone()
        self.keys, self.values = [], []
        for b, r in enumerate(case.requests):
            # Scores have a standard deviation of 2: neither flat nor a single key.
            query = torch.randn(r.rows, case.query_heads, dim) * (2 / dim**0.5 / case.scale)
            self.query[b, : r.rows] = query.to(dtype)
            keys = torch.randn(r.prefix + r.rows, heads, dim).to(dtype)
            values = torch.randn(r.prefix + r.rows, heads, dim).to(dtype)
            self.key[b, : r.rows], self.value[b, : r.rows] = keys[r.prefix :], values[r.prefix :]
            for position in range(r.prefix if r.slot >= 0 else 0):  # later positions overwrite earlier ones
                self.prefix_key[r.slot, position % case.capacity] = keys[position]
                self.prefix_value[r.slot, position % case.capacity] = values[position]
            self.keys.append(keys)
            self.values.append(values)
        self.slot = torch.tensor([r.slot for r in case.requests], dtype=torch.int32)
        self.prefix_length = torch.tensor([r.prefix for r in case.requests], dtype=torch.int32)
        self.length = torch.tensor([r.rows for r in case.requests], dtype=torch.int32)
        most = max((len(r.spans) for r in case.requests), default=0)
        self.spans = torch.zeros(batch, most, 2, dtype=torch.int32) if most else None
        for b, r in enumerate(case.requests):
            for i, span in enumerate(r.spans):
                assert self.spans is not None
                self.spans[b, i] = torch.tensor(span)

    def operands(self) -> tuple[Any, ...]:
        case = self.case
        common = (self.query, self.key, self.value, self.prefix_key, self.prefix_value)
        common += (self.slot, self.prefix_length, self.length)
        return (*common, *([self.spans] if case.causal else []), case.window, case.scale)

    def run(self, module: Any = block_attention) -> torch.Tensor:
        function = module.causal_attention if self.case.causal else module.canvas_attention
        result: torch.Tensor = function(*self.operands())
        return result

    def mask(self, b: int) -> torch.Tensor:
        case, r = self.case, self.case.requests[b]
        if case.causal:
            return reference.causal_mask(r.prefix, r.rows, case.window, r.spans, case.capacity)
        return reference.canvas_mask(r.prefix, r.rows, case.window)

    def wanted(self, b: int) -> torch.Tensor:
        """The result of request b in float64: [rows, query heads, head dim]."""
        query = self.query[b, : self.case.requests[b].rows]
        return reference.attend(query, self.keys[b], self.values[b], self.mask(b), self.case.scale)

    def in_low_precision(self, b: int, exact: torch.Tensor) -> torch.Tensor:
        """Request b in the tensors' own type, summed in several orders: at each element the result that is farthest
        from `exact`.

        With a handful of elements the error of one order may be nearly zero by chance, and torch's own would fail a
        bound made from another's.
        """
        worst = exact
        query = self.query[b, : self.case.requests[b].rows]
        for order in range(ORDERS if exact.numel() < LARGE else ORDERS_OF_LARGE):
            one_by_one = query.dtype == torch.float32 and order % 2 == 1
            d, k = torch.randperm(self.case.head_dim), torch.randperm(len(self.keys[b]))
            back = torch.argsort(d)
            operands = (query[..., d], self.keys[b][k][..., d], self.values[b][k][..., d], self.mask(b)[:, k])
            result = reference.attend(*operands, self.case.scale, query.dtype, one_by_one)[..., back].double()
            worst = torch.where((result - exact).abs() > (worst - exact).abs(), result, worst)
        return worst

    def poison_unseen(self) -> None:
        """Sets every cache row and block row to NaN that no query of its request may see."""
        for b, r in enumerate(self.case.requests):
            if r.slot < 0:
                continue
            seen = self.mask(b).any(dim=0)
            for position in (~seen).nonzero().flatten().tolist():
                row = position % self.case.capacity
                if r.prefix - self.case.capacity <= position < r.prefix:
                    self.prefix_key[r.slot, row] = NAN
                    self.prefix_value[r.slot, row] = NAN

    def check(self, result: torch.Tensor, outside: float = 0.0) -> None:
        dtype = self.query.dtype
        for b, r in enumerate(self.case.requests):
            rows = r.rows if r.slot >= 0 else 0
            assert bool((result[b, rows:] == outside).all()), f"rows without a query of request {b} were written"
            if rows:
                exact = self.wanted(b)
                assert_close(result[b, :rows], exact, dtype, self.in_low_precision(b, exact))
