"""What torch itself holds of a GPU's memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# The pool that every allocation is served from that is not part of a captured graph.
_DEFAULT_POOL = (0, 0)


def cublas_workspace_bytes(device: torch.device) -> int:
    """The workspace that torch gives cuBLAS for each stream in which it multiplies, and never frees.

    32 MiB on compute capability 9.0, in later releases of torch on 10.0 to 12.0 too; 2 x 4 MiB and 8 x 16 KiB elsewhere
    (parseChosenWorkspaceSize in torch's CublasHandlePool.cpp). Without a GPU the larger one.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] < 9:
        return 2 * 4 * 2**20 + 8 * 16 * 2**10
    return 32 * 2**20


def free_bytes(device: torch.device) -> int:
    """The bytes that a tensor may take: what the driver has free, and what torch has reserved and does not use.

    Pools of captured graphs are left out: only captures are served from them.
    """
    free: int = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused - sum(unused_in_pools(device).values())


def unused_in_pools(device: torch.device) -> dict[tuple[int, int], int]:
    """Pool of captured graphs -> its bytes that no tensor uses."""
    index = torch.cuda.current_device() if device.index is None else device.index
    unused: dict[tuple[int, int], int] = {}
    segments: Iterable[dict[str, Any]] = torch.cuda.memory_snapshot()
    for segment in segments:
        pool = tuple(segment["segment_pool_id"])
        if segment["device"] == index and pool != _DEFAULT_POOL:
            unused[pool] = unused.get(pool, 0) + segment["total_size"] - segment["allocated_size"]
    return unused
