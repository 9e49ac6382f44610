"""The operators, one module per kernel family. Importing this registers `torch.ops.dgemma`."""

from __future__ import annotations

import importlib
import importlib.util

import torch  # noqa: F401  the extension module needs torch's libraries loaded

from dgemma_ext import _C  # noqa: F401

for _family in ("grouped_gemm", "block_attention", "denoise"):
    if importlib.util.find_spec(f"{__name__}.{_family}") is not None:
        importlib.import_module(f"{__name__}.{_family}")
