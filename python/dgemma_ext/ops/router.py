"""The router: which experts a token goes to, and with what weights."""

from __future__ import annotations

from torch import Tensor

from dgemma_ext.ops.operators import operator

_route = operator("route")


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
    ids, weights = _route(input, scale, projection, per_expert_scale, top_k, epsilon)
    return ids, weights
