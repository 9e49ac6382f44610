"""The part `sampler`: the model's class, by its name, so that vLLM imports it where it loads such a model."""

from __future__ import annotations


def register() -> None:
    """Hands vLLM the model's class."""
