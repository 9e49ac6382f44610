"""The part `experts`."""

from __future__ import annotations


def register() -> None:
    """Hands vLLM the experts."""
