"""Where a model lies, and in what it computes: the options of `from_pretrained`, resolved."""

from __future__ import annotations

import torch

from dgemma_ext import _C
from dgemma_ext.config import ModelConfig
from dgemma_ext.layers import Products

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_products(batch_invariant: bool, device: torch.device, dtype: torch.dtype) -> Products:
    """How dense products are made. Raises ValueError where a batch cannot be kept from changing bits."""
    if device.type == "cpu":
        return Products.APART
    if not batch_invariant:
        return Products.TOGETHER
    if dtype != torch.bfloat16:
        raise ValueError(f"batch_invariant on a GPU is for dtype bfloat16, got {dtype}")
    if not _C.has_cuda():
        raise ValueError("batch_invariant on a GPU needs a build with CUDA kernels, and this one has none")
    return Products.INVARIANT


def resolve_device(device: str | torch.device) -> torch.device:
    """A device that is asked for, "auto" being a GPU where torch sees one. Raises ValueError for one that is not."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, and torch sees no CUDA GPU here")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, config: ModelConfig) -> torch.dtype:
    """A dtype that is asked for, "auto" being the checkpoint's. Raises ValueError for one that is not served."""
    if isinstance(dtype, str):
        if dtype == "auto":
            return config.dtype
        if dtype in _DTYPES:
            return _DTYPES[dtype]
    elif dtype in _DTYPES.values():
        return dtype
    raise ValueError(f"dtype must be auto, bfloat16 or float32, got {dtype!r}")
