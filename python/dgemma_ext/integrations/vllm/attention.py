"""The part `attention`: a backend over vLLM's paged cache."""

from __future__ import annotations


def register() -> None:
    """Hands vLLM the backend. There is none yet: vLLM's own attention runs."""
