"""`dgemma quantize`: writes a checkpoint's quantized form and prints the errors."""

from __future__ import annotations

import time
from pathlib import Path

from dgemma_ext.arguments import path
from dgemma_ext.checkpoint import (
    PARTS,
    LoadProgress,
    PartError,
    convert,
    parse_target,
    plan_conversion,
    resolve_checkpoint,
)
from dgemma_ext.cli.answer import write_json
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.units import format_bytes


def run(arguments: Arguments) -> None:
    parts = None if arguments.parts is None else arguments.parts.split(",")
    target = parse_target(arguments.to, parts, name="--to")
    source, destination = resolve_checkpoint(arguments.model), Path(path("OUT", arguments.out))
    before = plan_conversion(source, target).info.total_bytes
    began = time.monotonic()
    with LoadProgress("quantizing", before, None, lines=True) as bar:
        errors = convert(source, destination, target, bar.advance)
    seconds = time.monotonic() - began
    after = sum(file.stat().st_size for file in destination.glob("*.safetensors"))
    if arguments.json:
        write_json(
            {
                "event": "quantized",
                "path": str(destination),
                "weights": arguments.to,
                "bytes": {"before": before, "after": after},
                "seconds": seconds,
                "errors": [{"layer": e.layer, "part": e.part, "relative": e.relative} for e in errors],
            }
        )
        return
    print(_table(errors))
    print(f"{destination}: {format_bytes(before)} to {format_bytes(after)} as {arguments.to}, {seconds:.1f} s")


def _table(errors: list[PartError]) -> str:
    """Relative errors: a line for each layer, and one over all layers."""
    parts = [part for part in PARTS if any(error.part == part for error in errors)]
    by_place = {(error.layer, error.part): error.relative for error in errors}
    lines = ["||quantized - plain|| / ||plain||", f"{'layer':>5}" + "".join(f"{part:>12}" for part in parts)]
    for layer in sorted({error.layer for error in errors}):
        cells = (f"{by_place[layer, part]:>12.4f}" if (layer, part) in by_place else f"{'-':>12}" for part in parts)
        lines.append(f"{layer:>5}" + "".join(cells))
    totals = []
    for part in parts:
        total = PartError(-1, part)
        for error in errors:
            if error.part == part:
                total.error += error.error
                total.size += error.size
        totals.append(f"{total.relative:>12.4f}")
    lines.append(f"{'all':>5}" + "".join(totals))
    return "\n".join(lines)
