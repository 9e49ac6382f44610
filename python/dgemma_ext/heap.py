"""How the C library keeps the memory of tensors on a CPU: set when the package is imported.

torch takes each tensor's memory from malloc. GNU's C library gives a freed block back to the system where it is large
or ends the heap, so every tensor of a step, some megabytes, meets its pages anew, and each page of 4 KiB costs a fault.
Of a layer's residual and norms at the published width those were nine tenths of the time (csrc/layer/NOTES.md). A step
asks for the same blocks as the last one; here they stay. mallopt is of the whole process, which keeps up to
TRIM_THRESHOLD of freed memory for it.
"""

from __future__ import annotations

import ctypes
import os

# Blocks below it come from the heap: 32 MiB is the most that the C library takes (HEAP_MAX_SIZE / 2).
MMAP_THRESHOLD = 32 << 20
# The free end of the heap that is kept: what a layer of some canvases of 256 tokens has at a time.
TRIM_THRESHOLD = 128 << 20
# The numbers of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# A user who has set one of these knows better.
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Whether freed blocks stay with the process from now on: False where the user chose, or the C library has no such
    setting. An allocator that stands in for malloc takes no notice of it."""
    if any(name in os.environ for name in _SETTINGS):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is None:
        return False
    return bool(set_option(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)) and bool(set_option(_M_TRIM_THRESHOLD, TRIM_THRESHOLD))


keep_freed_memory()
