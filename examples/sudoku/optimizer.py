"""Muon: momentum, then the nearest orthogonal matrix as the update (K. Jordan et al., 2024), for stacks of matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# Coefficients of the quintic iteration, from the reference description: they trade exactness for fast inflation of
# small singular values.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Newton-Schulz iteration towards U V^T of every matrix in a stack [N, rows, columns]."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(iterations):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For weights of two dimensions, or three where the first counts independent matrices (experts)."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    state, gradient = self.state[parameter], parameter.grad
                    assert gradient is not None
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(state["momentum"], group["momentum"]))
                stack = torch.stack(updates).reshape(-1, *shape[-2:])
                scale = group["lr"] * max(1.0, shape[-2] / shape[-1]) ** 0.5
                directions = orthogonalize(stack).reshape(-1, *shape)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(directions.unbind()), alpha=-scale)
