"""Which parts of the plugin are on, by the environment, which all of vLLM's processes share."""

from __future__ import annotations

import os

PARTS = ("sampler", "experts", "attention", "rows")

_PARTS, _EXPERTS = "DGEMMA_VLLM_PARTS", "DGEMMA_VLLM_EXPERTS"


def experts_format() -> str | None:
    """The format that DGEMMA_VLLM_EXPERTS names for the experts' weights; None: as they are loaded."""
    return os.environ.get(_EXPERTS) or None


def parts() -> tuple[str, ...]:
    """The parts that DGEMMA_VLLM_PARTS names, separated by commas; all of them where it is not set.

    Raises ValueError for a part that there is not.
    """
    value = os.environ.get(_PARTS)
    if value is None:
        return PARTS
    named = [name.strip() for name in value.split(",") if name.strip()]
    for name in named:
        if name not in PARTS:
            raise ValueError(f"environment variable {_PARTS} must name {', '.join(PARTS)}, got {name!r}")
    return tuple(part for part in PARTS if part in named)
