"""The part `rows`."""

from __future__ import annotations


def register() -> None:
    """Hands vLLM the row kernels."""
