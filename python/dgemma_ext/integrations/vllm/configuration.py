"""What parts change in the configuration of a DiffusionGemma before vLLM starts it.

vLLM has a table of configuration classes by architecture. Ours stands in the table around vLLM's, and calls what the
parts have added, in the process that makes the configuration; the others get it made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ARCHITECTURE = "DiffusionGemmaForBlockDiffusion"

_changes: list[Callable[[Any], None]] = []


def add(change: Callable[[Any], None]) -> None:
    """Adds a change, which takes vLLM's VllmConfig; a change that is there already is not added again."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    if change not in _changes:
        _changes.append(change)
    theirs: Any = MODELS_CONFIG_MAP[ARCHITECTURE]
    if getattr(theirs, "of_dgemma_ext", False):
        return

    class Configuration(theirs):  # type: ignore[misc]
        of_dgemma_ext = True

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            super().verify_and_update_config(vllm_config)
            for change in _changes:
                change(vllm_config)

    MODELS_CONFIG_MAP[ARCHITECTURE] = Configuration
