"""The experts with weights and activations in FP8, in float64 but for the roundings that are meant."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reference.grouped_gemm import Array, gelu_tanh

LARGEST = 448.0
# The magnitudes of e4m3 by their codes: a fraction of three bits, the exponent's bias 7, no infinity.
MAGNITUDES = np.array([(code % 8 + 8 * (code > 7)) * 2.0 ** (max(code // 8, 1) - 10) for code in range(127)])


def rows_to_e4m3(rows: Tensor) -> tuple[Array, Array]:
    """Rows as values of e4m3, and what they are to be multiplied by [n, 1]. The factors are float32, as kernels have
    them: they decide where ties lie."""
    x = rows.float().numpy()
    largest = np.abs(x).max(-1, keepdims=True) if len(x) else np.zeros((0, 1), np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(LARGEST) / largest, np.float32(0))
    return nearest_e4m3((x * inverse).astype(np.float64)), (largest / np.float32(LARGEST)).astype(np.float64)


def nearest_e4m3(x: Array) -> Array:
    """The nearest value; of two equally near ones that with the even code; beyond 448 that."""
    magnitude = np.minimum(np.abs(x), LARGEST)
    above = np.searchsorted(MAGNITUDES, magnitude).clip(1, len(MAGNITUDES) - 1)
    below = above - 1
    middle = (MAGNITUDES[below] + MAGNITUDES[above]) / 2
    upwards = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    return np.copysign(MAGNITUDES[np.where(upwards, above, below)], x)


def moe_ffn(
    input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor, rounds: bool = True
) -> Array:
    """[tokens, hidden_size]. gate_up, down: the weights that are meant, float64. Rounded are the rows of input and of
    h, h to the dtype of input before that; nothing where `rounds` is False."""
    experts, hidden_size, expert_size = down.shape
    result = np.zeros((input.shape[0], hidden_size))

    def rounded(rows: Tensor) -> Array:
        values, scales = rows_to_e4m3(rows)
        product: Array = values * scales
        return product if rounds else rows.double().numpy()

    for e in range(experts):
        token, slot = (index.numpy() for index in torch.where(expert_ids == e))
        if token.size == 0:
            continue
        gate, up = np.split(rounded(input[token]) @ gate_up[e].double().numpy().T, [expert_size], axis=1)
        h = torch.from_numpy(gelu_tanh(gate) * up).to(input.dtype)
        y = rounded(h) @ down[e].double().numpy().T
        np.add.at(result, token, expert_weights[token, slot].double().numpy()[:, None] * y)
    return result
