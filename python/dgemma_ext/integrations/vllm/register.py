"""What vLLM calls in each of its processes, perhaps more than once in one."""

from __future__ import annotations

import importlib
import logging

from dgemma_ext.environment import check_environment
from dgemma_ext.integrations.vllm import settings, versions

_registered: set[str] = set()


def register() -> None:
    """Hands vLLM the parts that are on; each of them once.

    A part is a module of this room with a function `register`, which hands vLLM what the part brings.

    Raises ValueError for an environment variable without a meaning.
    """
    check_environment()
    parts = settings.parts()
    version = _version()
    refused = versions.refused(version)
    if refused is not None:
        if "" not in _registered:
            _logger().warning(refused)
        _registered.add("")
        return
    for part in parts:
        if part in _registered:
            continue
        importlib.import_module(_MODULES[part]).register()
        _registered.add(part)
    _logger().info("dgemma_ext inside vLLM %s: %s", version, ", ".join(parts) or "no part")


# By part.
_MODULES = {
    "sampler": "dgemma_ext.integrations.vllm.model_class",
    "experts": "dgemma_ext.integrations.vllm.experts",
    "attention": "dgemma_ext.integrations.vllm.attention",
    "rows": "dgemma_ext.integrations.vllm.rows",
}


def _version() -> str:
    from vllm.version import __version__

    return str(__version__)


def _logger() -> logging.Logger:
    # A child of vLLM's logger, so that vLLM's settings of logging hold.
    return logging.getLogger("vllm.plugins.dgemma")
