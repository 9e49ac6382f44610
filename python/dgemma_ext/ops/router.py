"""The router: which experts a token goes to, and with what weights."""

from __future__ import annotations

import torch
from torch import Tensor, library
from torch.nn import functional

from dgemma_ext.ops import plain


def route(
    input: Tensor, scale: Tensor, projection: Tensor, per_expert_scale: Tensor, top_k: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The most probable experts of every token, ties to the lower one, and what their outputs are multiplied by.

    Roundings are those of `DiffusionGemmaTextRouter` in transformers' modeling_diffusion_gemma.py: the norm in fp32,
    rounded; each product by a scale rounded; scores in the tensors' dtype; softmax and weights in fp32.

    Args:
        input: [tokens, hidden_size], the residual before any norm, float32 or bfloat16 (on a GPU bfloat16).
        scale: [hidden_size], dtype of input, as all that follow.
        projection: [experts, hidden_size].
        per_expert_scale: [experts].

    Returns:
        Ids int32 [tokens, top_k], most probable first, and weights float32 [tokens, top_k].

    Raises:
        ValueError: an argument has another dtype, shape or device, or there are fewer experts than top_k.
    """
    hidden_size, experts = input.shape[-1], projection.shape[0]
    for name, tensor, shape in (
        ("input", input, (input.shape[0], hidden_size)),
        ("scale", scale, (hidden_size,)),
        ("projection", projection, (experts, hidden_size)),
        ("per_expert_scale", per_expert_scale, (experts,)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != input.dtype or tensor.device != input.device:
            got = f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: got {got}, wants {list(shape)} of {input.dtype} on {input.device}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: got {top_k}, wants 1 to {experts}")
    ids, weights = torch.ops.dgemma.route(input, scale, projection, per_expert_scale, top_k, epsilon)
    return ids, weights


def probabilities(input: Tensor, scale: Tensor, projection: Tensor, epsilon: float) -> Tensor:
    """Softmax over all experts, float32 [tokens, experts]."""
    normed = functional.rms_norm(input.float(), input.shape[-1:], None, epsilon).to(input.dtype)
    scores = functional.linear(normed * scale * input.shape[-1] ** -0.5, projection)
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


def weights_of(probabilities: Tensor, ids: Tensor, per_expert_scale: Tensor) -> Tensor:
    """The chosen experts' probabilities divided by their sum, times the per-expert scale: float32 [tokens, top_k]."""
    chosen = probabilities.gather(1, ids)
    return chosen / chosen.sum(dim=-1, keepdim=True) * per_expert_scale[ids]


def _plain(
    input: Tensor, scale: Tensor, projection: Tensor, per_expert_scale: Tensor, top_k: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """In torch's operators. A stable sort: torch.topk promises no order, and bfloat16 scores tie often."""
    found = probabilities(input, scale, projection, epsilon)
    ids = torch.sort(found, dim=-1, descending=True, stable=True).indices[:, :top_k]
    return ids.to(torch.int32), weights_of(found, ids, per_expert_scale)


plain.register("dgemma::route", _plain)


@library.register_fake("dgemma::route")
def _route_fake(input: Tensor, scale: Tensor, projection: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    top_k = rest[1]
    assert isinstance(top_k, int)
    shape = (input.shape[0], top_k)
    return input.new_empty(shape, dtype=torch.int32), input.new_empty(shape, dtype=torch.float32)
