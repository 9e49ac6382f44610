"""Whether the plugin is on and which of its parts, by the environment, which all of vLLM's processes share."""

from __future__ import annotations

import os

NAME = "dgemma"  # of the entry point; VLLM_PLUGINS names plugins by it
PARTS = ("sampler", "experts", "attention")

_SWITCH, _PARTS, _EXPERTS = "DGEMMA_VLLM", "DGEMMA_VLLM_PARTS", "DGEMMA_VLLM_EXPERTS"


def is_on() -> bool:
    """Whether DGEMMA_VLLM is 1, or VLLM_PLUGINS names the plugin and DGEMMA_VLLM is not 0.

    Raises ValueError for another value of DGEMMA_VLLM.
    """
    switch = os.environ.get(_SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"environment variable {_SWITCH} must be 0 or 1, got {switch!r}")
    named = NAME in [name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(",")]
    return switch == "1" or (named and switch != "0")


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
