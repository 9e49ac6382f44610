"""What the entry point names that vLLM loads in each of its processes (docs/vllm.md).

It is a package of its own, so that a vLLM whose user has not switched the plugin on imports nothing of dgemma_ext.
"""

from __future__ import annotations

import os

NAME = "dgemma"  # of the entry point; VLLM_PLUGINS names plugins by it

_SWITCH = "DGEMMA_VLLM"


def register() -> None:
    """Hands vLLM the parts that are on (dgemma_ext.integrations.vllm), where the plugin is on.

    Raises ValueError for an environment variable of the plugin without a meaning.
    """
    if is_on():
        from dgemma_ext.integrations import vllm

        vllm.register()


def is_on() -> bool:
    """Whether DGEMMA_VLLM is 1, or VLLM_PLUGINS names the plugin and DGEMMA_VLLM is not 0.

    Raises ValueError for another value of DGEMMA_VLLM.
    """
    switch = os.environ.get(_SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"environment variable {_SWITCH} must be 0 or 1, got {switch!r}")
    named = NAME in [name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(",")]
    return switch == "1" or (named and switch != "0")
