"""The router in torch's operators: the CPU's form of `ops.router`, and a GPU's without kernels.

The CPU keeps it though the C interface has a kernel for it: scores are torch's product, so that ties fall as they do in
transformers.
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
    return _softmax(functional.linear(scaled_input(input, scale, epsilon), projection))


def _softmax(scores: Tensor) -> Tensor:
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
    """`route` from the projection's product, [tokens, experts]. A stable sort: torch.topk promises no order, and
    bfloat16 scores tie often."""
    found = _softmax(scores)
    ids = torch.sort(found, dim=-1, descending=True, stable=True).indices[:, :top_k]
    return ids.to(torch.int32), weights_of(found, ids, per_expert_scale)


register("dgemma::route", route)
