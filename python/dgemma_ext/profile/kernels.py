"""Finds the GPU time of every recorded call in a trace of torch's profiler.

A kernel has the correlation number of the CUDA call that launched it, and that launch lies, on the host's clock, inside
the range that the Recorder has opened for its operator.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dgemma_ext.profile.recorder import RANGE, Call
from dgemma_ext.profile.timeline import Slice

_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_MICROSECOND = 1e-6


def events_of(profiler: torch.profiler.profile) -> list[dict[str, Any]]:
    """The events of a finished profiler, from its Chrome trace."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return events


def slices_on_gpu(events: Sequence[dict[str, Any]], calls: Sequence[Call]) -> list[Slice]:
    """A slice for every call that launched kernels: from the begin of the first to the end of the last, with the
    seconds that they took. Raises RuntimeError where the trace has no kernel of any call."""
    complete = [event for event in events if event.get("ph") == "X"]
    ranges = sorted(
        (event["ts"], event["ts"] + event["dur"], int(event["name"].removeprefix(RANGE)))
        for event in complete
        if event["name"].startswith(RANGE) and event.get("cat") == "user_annotation"
    )
    begins = [begin for begin, _, _ in ranges]
    launched: dict[int, int] = {}
    for event in complete:
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {}):
            index = bisect_right(begins, event["ts"]) - 1
            if index >= 0 and event["ts"] <= ranges[index][1]:
                launched[event["args"]["correlation"]] = ranges[index][2]
    kernels: dict[int, list[dict[str, Any]]] = {}
    for event in complete:
        number = launched.get(event.get("args", {}).get("correlation"))
        if event.get("cat") in _ON_GPU and number is not None:
            kernels.setdefault(number, []).append(event)
    if not kernels:
        raise RuntimeError("torch's profiler told of no kernel: CUPTI, which it asks, does not work here")
    found = []
    for number, of_call in kernels.items():
        call = calls[number]
        begin = min(event["ts"] for event in of_call)
        end = max(event["ts"] + event["dur"] for event in of_call)
        seconds = sum(event["dur"] for event in of_call) * _MICROSECOND
        names = tuple(event["name"] for event in of_call)
        place = (begin * _MICROSECOND, end * _MICROSECOND)
        found.append(Slice(call.part, call.name, call.layer, *place, seconds, call.repeat, names))
    found.sort(key=lambda piece: piece.begin)
    # Kernels on two streams may overlap, but slices in one row of a trace may not.
    apart = [replace(piece, end=min(piece.end, following.begin)) for piece, following in pairwise(found)]
    return [*apart, found[-1]]
