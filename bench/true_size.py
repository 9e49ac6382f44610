"""A random model of the true size, made on the device: 52 GB in bfloat16, without a file."""

from __future__ import annotations

import dgemma_ext as dg
from dgemma_ext.checkpoint import ModelConfig, parse_target
from dgemma_ext.profile.true_size import EXPERTS, LAYERS, true_config
from dgemma_ext.profile.true_size import random_model as made_model

__all__ = ["EXPERTS", "LAYERS", "random_model", "true_config"]


def random_model(
    config: ModelConfig,
    device: str = "cuda",
    experts_hit: int | None = None,
    final_norm: float = 1.0,
    seed: int = 0,
    weights: str = "bfloat16",
) -> dg.DiffusionGemma:
    """dgemma_ext.profile.true_size.random_model; weights: "bfloat16", or a format of the command line."""
    target = None if weights == "bfloat16" else parse_target(weights)
    return made_model(config, device, target=target, experts_hit=experts_hit, final_norm=final_norm, seed=seed)
