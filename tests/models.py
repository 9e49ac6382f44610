"""Small random models for tests, loaded once per process."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

import dgemma_ext as dg
from checkpoints import make_checkpoint


@cache
def random_model(dtype: torch.dtype = torch.float32, **sizes: Any) -> dg.DiffusionGemma:
    """A model of the given sizes (tests/checkpoints.py) with a tokenizer; the same object for the same arguments."""
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), dtype=torch.float32, **sizes)
        # Converting copies the weights, so the folder may go.
        model = dg.DiffusionGemma.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
        return (
            model if dtype == torch.bfloat16 else dg.DiffusionGemma.from_pretrained(folder, device="cpu", dtype=dtype)
        )


def smallest_model() -> dg.DiffusionGemma:
    """So small that a denoising step is nearly all Python: for thousands of schedules."""
    return random_model(
        layers=("sliding_attention", "full_attention"),
        hidden=16,
        intermediate=16,
        moe_intermediate=8,
        experts=2,
        top_k=1,
        vocabulary=300,
        heads=2,
        kv_heads=1,
        head_dim=8,
        global_head_dim=8,
        window=6,
        canvas=4,
        max_positions=64,
        with_tokenizer=False,
    )
