"""The mixture-of-experts feed-forward in float64, one expert after another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


def moe_ffn(input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Array:
    """[tokens, hidden_size] in float64. Nothing is rounded, and nothing is read that no slot names."""
    experts, hidden_size, expert_size = down.shape
    result = np.zeros((input.shape[0], hidden_size))
    for e in range(experts):
        token, slot = (index.numpy() for index in torch.where(expert_ids == e))  # [pairs] each
        if token.size == 0:
            continue
        x = input[token].double().numpy()  # [pairs, hidden_size]
        gate = x @ gate_up[e, :expert_size].double().numpy().T  # [pairs, expert_size]
        up = x @ gate_up[e, expert_size:].double().numpy().T  # [pairs, expert_size]
        y = (gelu_tanh(gate) * up) @ down[e].double().numpy().T  # [pairs, hidden_size]
        weights = expert_weights[token, slot].double().numpy()  # [pairs]
        np.add.at(result, token, weights[:, None] * y)  # a token may have the same expert in several slots
    return result


def gelu_tanh(x: Array) -> Array:
    """Hendrycks and Gimpel, "Gaussian Error Linear Units", the tanh form."""
    gelu: Array = 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return gelu


def moe_ffn_rounded(input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same maths in torch's low precision, rounded after every step, as transformers' eager form does it."""
    expert_size = down.shape[2]
    result = torch.zeros_like(input)  # [tokens, hidden_size]
    for e in range(down.shape[0]):
        token, slot = torch.where(expert_ids == e)  # [pairs] each
        gate, up = torch.nn.functional.linear(input[token], gate_up[e]).split(expert_size, dim=-1)
        h = torch.nn.functional.gelu(gate, approximate="tanh") * up  # [pairs, expert_size]
        y = torch.nn.functional.linear(h, down[e]) * expert_weights[token, slot, None]  # [pairs, hidden_size], fp32
        result.index_add_(0, token, y.to(result.dtype))
    return result
