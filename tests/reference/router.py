"""The router with bfloat16's roundings where the model has them, and float64 between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# How far sums of products in fp32, in any order, may be off, as a part of the sum of their magnitudes: many times what
# sums of some thousand terms by blocks lose.
SUM_ERROR = 2.0**-22


@dataclass
class Routes:
    """What is sure of a call: nothing is said of tokens whose choice hangs on the order of a sum."""

    expert_ids: Tensor  # int64 [tokens, top_k]
    expert_weights: Tensor  # float64 [tokens, top_k]
    sure: Tensor  # bool [tokens]


def scaled_rows(input: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """bfloat16 [tokens, hidden]: normed, times the router's scale, times hidden^-1/2, rounded after each."""
    wide = input.double()
    inverse = 1.0 / (wide.square().mean(dim=1, keepdim=True).float() + epsilon).sqrt()
    normed = (input.float() * inverse).bfloat16()
    scaled = (normed.float() * scale.float()).bfloat16()
    return (scaled.float() * torch.tensor(input.shape[1] ** -0.5, dtype=torch.float32)).bfloat16()


def route(
    input: Tensor, scale: Tensor, projection: Tensor, per_expert_scale: Tensor, top_k: int, epsilon: float
) -> Routes:
    scaled = scaled_rows(input, scale, epsilon).double()  # [tokens, hidden]
    wide = projection.double()
    exact = scaled @ wide.T  # [tokens, experts]
    error = SUM_ERROR * (scaled.abs() @ wide.abs().T)
    scores = exact.float().bfloat16()

    probabilities = torch.softmax(scores, dim=1, dtype=torch.float32)
    ids = torch.sort(probabilities, dim=1, descending=True, stable=True).indices[:, :top_k]
    wide_probabilities = torch.softmax(scores.double(), dim=1)
    chosen = wide_probabilities.gather(1, ids)
    weights = chosen / chosen.sum(dim=1, keepdim=True) * per_expert_scale.double()[ids]

    # An expert whose score may round either way matters if it is chosen or not far from that.
    last = scores.double().gather(1, ids[:, -1:])
    contends = exact >= last - last.abs() * 2.0**-6 - error
    unsure = (exact - error).float().bfloat16() != (exact + error).float().bfloat16()
    return Routes(ids, weights, ~(unsure & contends).any(dim=1))
