"""The router: which experts a token goes to, with what weights; and what stands before and behind its product."""

from __future__ import annotations

from torch import Tensor

from dgemma_ext.ops.operators import operator
from dgemma_ext.ops.plain.router import softmax

_route, _router_input, _router_choice = operator("route"), operator("router_input"), operator("router_choice")


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


def router_input(input: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """What the router's projection multiplies, without a gradient.

    The norm in fp32, rounded; its products by scale and by hidden_size^-1/2, each rounded.

    Args:
        input: [tokens, hidden_size], the residual before any norm, float32 or bfloat16.
        scale: [hidden_size], dtype of input.

    Returns:
        [tokens, hidden_size], dtype of input. On a CPU it has the bits of torch's operators (rows of eight values or
        more).

    Raises:
        ValueError: an argument has another dtype, shape or device.
    """
    result: Tensor = _router_input(input, scale, epsilon)
    return result


def choose(scores: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`route` from the projection's product, without a gradient. On a CPU it has the bits of torch's operators.

    Args:
        scores: [tokens, experts], float32 or bfloat16.
        per_expert_scale: [experts], float32 or bfloat16.

    Returns:
        As `route`.

    Raises:
        ValueError: an argument has another dtype, shape or device, or there are fewer experts than top_k.
    """
    return router_choice(softmax(scores), per_expert_scale, top_k)


def router_choice(probabilities: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`choose` from the softmax of the scores, float32 [tokens, experts]; NaN counts as the largest."""
    ids, weights = _router_choice(probabilities, per_expert_scale, top_k)
    return ids, weights
