"""A profile as a Chrome trace, which Perfetto and chrome://tracing open: a slice for every pass, part and operator.

The format: "Trace Event Format" of the Chromium project, complete events ("X"), times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma_ext.profile.timeline import Pass, Slice

if TYPE_CHECKING:
    from dgemma_ext.profile.run import Profile


def write(found: Profile, file: Path) -> None:
    """Writes the recorded steps and the recorded encode pass, each as a process of the trace."""
    events: list[dict[str, Any]] = []
    for number, (name, one) in enumerate((("denoising step", found.step), ("encode", found.encode)), start=1):
        events.append({"ph": "M", "pid": number, "tid": 1, "name": "process_name", "args": {"name": name}})
        events += _events(one, name, number)
    about = {"device": found.device, "dtype": found.dtype, "prefix": found.prefix, "batch": found.batch}
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})
    file.write_text(text + "\n", encoding="utf-8")


def _events(one: Pass, name: str, process: int) -> Iterator[dict[str, Any]]:
    """Slices of passes, parts and operators, each inside the one before."""
    start = min([begin for begin, _ in one.spans] + [piece.begin for piece in one.slices])

    def event(name: str, kind: str, begin: float, end: float, arguments: dict[str, Any]) -> dict[str, Any]:
        # Begins and ends are rounded alike, so that each slice stays inside the one around it.
        first, last = round((begin - start) * 1e6, 3), round((end - start) * 1e6, 3)
        place = {"ph": "X", "pid": process, "tid": 1, "ts": first, "dur": round(last - first, 3)}
        return {"name": name, "cat": kind, **place, "args": arguments}

    for begin, end in one.spans:
        yield event(name, "pass", begin, end, {"floor_us": one.floor * 1e6})
    for (part, layer, _), group in groupby(one.slices, key=lambda piece: (piece.part, piece.layer, piece.repeat)):
        pieces = list(group)
        yield event(part.label, "part", pieces[0].begin, pieces[-1].end, _arguments(one, pieces))
        for piece in pieces:
            arguments = _arguments(one, [piece])
            if piece.kernels:
                arguments["kernels"] = list(piece.kernels)
            title = piece.name if layer is None else f"{piece.name} {layer}"
            yield event(title, "operator", piece.begin, piece.end, arguments)


def _arguments(one: Pass, pieces: Sequence[Slice]) -> dict[str, Any]:
    """The time of slices, and the sums of their counted work."""
    works = [work for work in map(one.work_of, pieces) if work is not None]
    arguments: dict[str, Any] = {"us": sum(piece.seconds for piece in pieces) * 1e6}
    if works:
        moved, flops, floor = (sum(column) for column in zip(*works, strict=True))
        arguments |= {"bytes": moved, "flops": flops, "floor_us": floor * 1e6}
    return arguments
