"""Where the plain torch forms of the operators (`<family>_plain.py`) serve a GPU.

They do in a build without CUDA kernels, and in every build when DGEMMA_KERNELS=plain is in the environment of the
process: to see whether a kernel is at fault, or for float32, which no kernel takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import library

from dgemma_ext import _C  # noqa: F401  registers the kernels


def register_on_gpu(name: str, function: Callable[..., Any]) -> None:
    """Makes `function` the GPU's form of an operator ("dgemma::sample.out"), unless a kernel is there and wanted."""
    if not _has_kernel(name, "CUDA") or os.environ.get("DGEMMA_KERNELS") == "plain":
        library.impl(name, "CUDA", function)


def register(name: str, function: Callable[..., Any]) -> None:
    """Makes `function` the form of an operator on the CPU, where no kernel is of its own, and as above on a GPU."""
    if not _has_kernel(name, "CPU"):
        library.impl(name, "CPU", function)
    register_on_gpu(name, function)


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
