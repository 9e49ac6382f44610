"""The environment variables that this package reads, and the values that they may have.

docs/engine.md says what they are for; some are read in C++.
"""

from __future__ import annotations

import os

import dgemma_ext._C as _C

_SWITCHES = ("DGEMMA_DEBUG", "DGEMMA_PDL", "DGEMMA_SYNC")


def check_environment() -> None:
    """Raises ValueError for a variable of ours with a value that has no meaning."""
    for name in _SWITCHES:
        _require(name, ("", "0", "1"), "0 or 1")
    _require("DGEMMA_KERNELS", ("", "plain"), "plain")
    _C.cpu_variant()  # DGEMMA_CPU, whose values depend on the machine


def debug() -> bool:
    """DGEMMA_DEBUG: whether every layer's output is checked, and errors come with their traceback."""
    return _is_set("DGEMMA_DEBUG")


def synchronous() -> bool:
    """DGEMMA_SYNC: whether every operator waits for its kernels."""
    return _is_set("DGEMMA_SYNC")


def plain_kernels() -> bool:
    """DGEMMA_KERNELS=plain: whether torch's operators run in place of kernels on a GPU."""
    return os.environ.get("DGEMMA_KERNELS") == "plain"


def _is_set(name: str) -> bool:
    return os.environ.get(name) == "1"


def _require(name: str, values: tuple[str, ...], wanted: str) -> None:
    value = os.environ.get(name, "")
    if value not in values:
        raise ValueError(f"environment variable {name} must be {wanted}, got {value!r}")
