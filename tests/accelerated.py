"""Loads transformers' models with and without `dg.accelerate` from one random checkpoint, for tests."""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dgemma_ext as dg
from checkpoints import FULL, SLIDING, load_transformers, make_checkpoint
from dgemma_ext.integrations.transformers import AccelerationWarning
from dgemma_ext.ops import block_attention, denoise, grouped_gemm

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "flat": dict(hidden=96, vocabulary=300, window=16, canvas=8, seed=1),
    "per_layer": dict(
        dialect="per_layer",
        layers=[SLIDING, FULL, SLIDING, FULL],
        hidden=80,
        heads=6,
        kv_heads=3,
        global_kv_heads=2,
        global_head_dim=48,
        experts=12,
        top_k=3,
        vocabulary=308,
        window=12,
        canvas=8,
        softcap=20.0,
        seed=2,
    ),
}

# Operators that run on the kernels, by name.
KERNELS = {
    "canvas_attention": block_attention,
    "causal_attention": block_attention,
    "moe_ffn": grouped_gemm,
    "vocabulary_statistics": denoise,
    "update_canvas_": denoise,
    "soft_embedding": denoise,
}


@functools.cache
def unaccelerated(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """Transformers' model without acceleration; the same object for the same arguments, which tests must not change."""
    with tempfile.TemporaryDirectory() as folder:
        # Drawn as float64, which neither side loads: every tensor is a copy, so the folder may be deleted.
        make_checkpoint(Path(folder), with_tokenizer=False, dtype=torch.float64, **CHECKPOINTS[name])
        return load_transformers(Path(folder), dtype, attn_implementation=attention)


def twin(model: Any, enabled: bool = True) -> Any:
    """A copy of the model, accelerated or not."""
    return dg.accelerate(copy.deepcopy(model)) if enabled else copy.deepcopy(model)


@contextlib.contextmanager
def counted_kernels() -> Iterator[Counter[str]]:
    """Counts the calls of each operator inside the block."""
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for name, module in KERNELS.items():
            stack.enter_context(mock.patch.object(module, name, _counting(name, getattr(module, name), counts)))
        yield counts


def _counting(name: str, function: Any, counts: Counter[str]) -> Any:
    def call(*arguments: Any, **keywords: Any) -> Any:
        counts[name] += 1
        return function(*arguments, **keywords)

    return call


@contextlib.contextmanager
def caught_fallbacks() -> Iterator[list[str]]:
    """Collects the messages of every AccelerationWarning inside the block."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(one.message) for one in caught if issubclass(one.category, AccelerationWarning)]


@contextlib.contextmanager
def all_on_kernels() -> Iterator[Counter[str]]:
    """Asserts that nothing inside the block falls back and that something runs on the kernels."""
    with caught_fallbacks() as fallbacks, counted_kernels() as counts:
        yield counts
    assert not fallbacks
    assert counts


def random_ids(model: Any, rows: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.text_config.vocab_size, (rows, count), generator=generator)
