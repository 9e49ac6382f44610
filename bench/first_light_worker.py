"""Times kernels one after the other in this process, a JSON line each: for first_light.py, which starts it.

python bench/first_light_worker.py full|small all WORD...      those whose names hold all words
python bench/first_light_worker.py full|small named NAME...    these
python bench/first_light_worker.py full|small list WORD...     only says which

The first line says which kernels it goes through.

For tests: FIRST_LIGHT_KERNEL_DIES and FIRST_LIGHT_KERNEL_HANGS name a kernel before which the process does that.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from first_light import CANNOT
from first_light_kernels import FULL, KERNELS, SMALL, Kernel
from gpu_clock import Timing, floor_microseconds, timed

IN_A_ROW = 8


def main() -> int:
    size, mode, *names = sys.argv[1:]
    if mode != "named":
        names = [name for name in KERNELS if all(word in name for word in names)]
    print(json.dumps({"kernels": names}), flush=True)
    if mode == "list":
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and size != "small":
        print("first_light: no GPU is visible to torch; --small runs small sizes on the CPU")
        return CANNOT
    planted = os.environ.get("FIRST_LIGHT_KERNEL_DIES", ""), os.environ.get("FIRST_LIGHT_KERNEL_HANGS", "")
    for name in names:
        if name == planted[0]:
            os.abort()
        if name == planted[1]:
            time.sleep(3600)
        try:
            line = measure(KERNELS[name](SMALL if size == "small" else FULL, device), device)
        except Exception as error:
            line = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps({"kernel": name, **line}), flush=True)
        if device == "cuda" and not _usable():
            return 1  # a new process goes on
    return 0


def measure(kernel: Kernel, device: str) -> dict[str, Any]:
    calls = itertools.cycle(kernel.calls)
    clock = timed if device == "cuda" else _timed_on_cpu

    def in_a_row() -> None:
        for _ in range(IN_A_ROW):
            next(calls)()

    found = {"distance": kernel.distance()} if kernel.distance is not None else {}
    one, row = clock(lambda: next(calls)()), clock(in_a_row)
    floor = floor_microseconds(kernel.work) if device == "cuda" else None
    return {
        "us": one.microseconds,
        "us_in_a_row": row.microseconds / IN_A_ROW,
        "host_us": one.host_microseconds,
        "hidden": one.hidden and row.hidden,
        "bytes": kernel.work.bytes,
        "operations": kernel.work.operations,
        "floor_us": floor,
        "share": floor / one.microseconds if floor is not None else None,
        "peer_us": clock(kernel.peer).microseconds if kernel.peer is not None else None,
        **found,
        **kernel.about,
    }


def _timed_on_cpu(call: Callable[[], object]) -> Timing:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e6)
    return Timing(median(times), median(times), True)


def _usable() -> bool:
    """False after a fault, when every call of this process fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
