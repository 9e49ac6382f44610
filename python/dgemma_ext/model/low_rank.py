"""Low-rank factors beside a weight: y = x W^T + (x A^T) B^T, exact whatever format the weight W is kept in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor
from torch.nn import functional

# A product of rows with a weight: (x [rows, in], weight [out, in]) → [rows, out].
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LowRank:
    """The factors of one weight, in the dtype of the rows. The adapter's scale is in b.

    a: [rank, in], b: [out, rank], for all rows; [B, rank, in] and [B, out, rank], for each of B canvases its own; or
    [experts, rank, in] and [experts, out, rank].
    """

    a: Tensor
    b: Tensor

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Adds (x a^T) b^T to y [rows, out], in place. With factors for each canvas, x [rows, in] has its rows in
        turn, as many of each."""
        if self.a.dim() == 2:
            return y.addmm_(functional.linear(x, self.a), self.b.T)
        count = self.a.shape[0]
        by_canvas = y.unflatten(0, (count, -1))
        by_canvas.baddbmm_(x.unflatten(0, (count, -1)).bmm(self.a.mT), self.b.mT)
        return y

    def add_by(self, product: Product, y: Tensor, x: Tensor) -> Tensor:
        """`add_to` by a product whose bits for a row do not depend on the other rows."""
        if self.a.dim() == 2:
            return y.add_(product(product(x, self.a), self.b))
        count = self.a.shape[0]
        for rows, inputs, a, b in zip(y.chunk(count), x.chunk(count), self.a, self.b, strict=True):
            rows.add_(product(product(inputs, a.contiguous()), b.contiguous()))
        return y


# Attribute of LayerWeights or ModelWeights → the factors beside it.
LowRanks = Mapping[str, LowRank]
NO_FACTORS: LowRanks = MappingProxyType({})


@dataclass(frozen=True)
class Side:
    """What stands beside the weights of a layer in a pass.

    by_request: the factors of each request's rows in turn, as Rows has them. by_canvas: factors for each of the pass's
    canvases, on the device; where they are given, by_request rules the canvases' experts alone.
    """

    by_request: tuple[LowRanks, ...]
    by_canvas: LowRanks | None = None

    def has(self, name: str) -> bool:
        return any(name in factors for factors in (*self.by_request, self.by_canvas or {}))
