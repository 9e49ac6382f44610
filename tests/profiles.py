"""Small models and their profiles for tests, made once per process."""

from __future__ import annotations

from functools import cache

import dgemma_ext as dg
from command import random_checkpoint
from dgemma_ext.profile import Profile, profile

PREFIX, STEPS = 40, 3

# The changed fields of a small random model's configuration.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 16,
    "top_k_experts": 2,
    "vocab_size": 300,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "max_position_embeddings": 256,
    "canvas_length": 64,
}


@cache
def model(weights: str = "auto") -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(random_checkpoint(hidden=128, intermediate=128), weights=weights)


@cache
def profiled(batch: int = 1, weights: str = "auto", batched: bool = False) -> Profile:
    """batched: requests share a step, as on a GPU."""
    return profile(model(weights), steps=STEPS, prefix=PREFIX, batch=batch, batched=batched)
