"""Memory of many gigabytes of which only what is written takes room: offsets past 2^31 are real there."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

MAP_NORESERVE = 0x4000  # of Linux on x86-64; Python 3.11 has no name for it


def sparse(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros, one after the other."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)
