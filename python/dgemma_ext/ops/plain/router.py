"""The router in torch's operators, and around its product: the CPU's form of `ops.router`, and a GPU's without kernels.

The CPU takes torch's product and softmax though the C interface has a kernel for all of it, so that ties fall as they
do in transformers. What stands before and behind them are kernels there, with the bits of the functions here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext.ops.plain.registration import register


def scaled_input(input: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """What the projection multiplies, [tokens, hidden_size]."""
    normed = functional.rms_norm(input.float(), input.shape[-1:], None, epsilon).to(input.dtype)
    return normed * scale * input.shape[-1] ** -0.5


def probabilities(input: Tensor, scale: Tensor, projection: Tensor, epsilon: float) -> Tensor:
    """Softmax over all experts, float32 [tokens, experts]."""
    return softmax(functional.linear(scaled_input(input, scale, epsilon), projection))


def softmax(scores: Tensor) -> Tensor:
    """Over all experts, float32."""
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


def weights_of(probabilities: Tensor, ids: Tensor, per_expert_scale: Tensor) -> Tensor:
    """The chosen experts' probabilities divided by their sum, times the per-expert scale: float32 [tokens, top_k]."""
    chosen = probabilities.gather(1, ids)
    return chosen / chosen.sum(dim=-1, keepdim=True) * per_expert_scale[ids]


def route(
    input: Tensor, scale: Tensor, projection: Tensor, per_expert_scale: Tensor, top_k: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """In torch's operators."""
    return choose(functional.linear(scaled_input(input, scale, epsilon), projection), per_expert_scale, top_k)


def choose(scores: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`route` from the projection's product, [tokens, experts]."""
    return choice(softmax(scores), per_expert_scale, top_k)


def choice(probabilities: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`choose` from the softmax. A stable sort: torch.topk promises no order, and bfloat16 scores tie often."""
    ids = torch.sort(probabilities, dim=-1, descending=True, stable=True).indices[:, :top_k]
    return ids.to(torch.int32), weights_of(probabilities, ids, per_expert_scale)


def route_around_product(
    input: Tensor, scale: Tensor, projection: Tensor, per_expert_scale: Tensor, top_k: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`route` with operators of our own before torch's product and behind its softmax."""
    scaled = torch.ops.dgemma.router_input.default(input, scale, epsilon)
    found = softmax(functional.linear(scaled, projection))
    ids, weights = torch.ops.dgemma.router_choice.default(found, per_expert_scale, top_k)
    return ids, weights


register("dgemma::router_input", scaled_input)
register("dgemma::router_choice", choice)
register("dgemma::route", route_around_product)
