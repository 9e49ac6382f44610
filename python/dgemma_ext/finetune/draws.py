"""Every random number of a run, by Philox with key = seed and counter = (example, epoch, position, purpose).

So what an example meets in an epoch depends neither on the batch that it is in nor on where a run was interrupted.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from dgemma_ext.ops.plain.denoise import philox_uniforms


class Purpose(enum.IntEnum):
    """What a draw is for; the last word of its counter. The sampler's purposes, for which a run's evaluations draw, are
    below these."""

    FACTORS = 16
    SHUFFLE = 17
    CANVAS = 18  # which of an answer's canvases is denoised
    NOISE_LEVEL = 19
    NOISED = 20  # whether a position holds noise
    NOISE_TOKEN = 21
    SELF_CONDITIONED = 22


def uniforms(seed: int, examples: Tensor, epoch: int | Tensor, length: int, purpose: Purpose) -> Tensor:
    """float64 [examples, length] in [0, 1); examples and epochs are integers below 2^32."""
    key = torch.full(examples.shape, seed, dtype=torch.int64, device=examples.device)
    epochs = torch.as_tensor(epoch, dtype=torch.int64, device=examples.device).expand(examples.shape)
    return philox_uniforms(key, examples, epochs, length, int(purpose))
