"""`dgemma quantize`: writes a checkpoint's quantized form and prints the errors."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor

from dgemma_ext.arguments import path
from dgemma_ext.checkpoint import (
    PARTS,
    Adapter,
    LoadProgress,
    Merge,
    ModelConfig,
    PartError,
    check_destination,
    convert,
    parse_target,
    plan_conversion,
    resolve_checkpoint,
)
from dgemma_ext.cli.answer import write_json
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.model import second_moments
from dgemma_ext.units import format_bytes

# Bytes of a calibration's text: some four million tokens, where some ten thousand are enough.
_LARGEST_TEXT = 1 << 24


def run(arguments: Arguments) -> None:
    parts = None if arguments.parts is None else arguments.parts.split(",")
    target = parse_target(arguments.to, parts, name="--to")
    source, destination = resolve_checkpoint(arguments.model), Path(path("OUT", arguments.out))
    check_destination(destination)  # before the work of a calibration
    before = plan_conversion(source, target).info.total_bytes
    adapter, (folder, _) = None, arguments.adapters
    if folder is not None:
        adapter = Adapter.from_folder(folder, ModelConfig.from_file(source), arguments.adapter_passes)
    merge = None if adapter is None else Merge(adapter)
    moments = None if arguments.calibrate is None else _moments(source, arguments.calibrate, adapter)
    began = time.monotonic()
    with LoadProgress("quantizing", before, None, lines=True) as bar:
        errors = convert(source, destination, target, bar.advance, moments, merge)
    seconds = time.monotonic() - began
    after = sum(file.stat().st_size for file in destination.glob("*.safetensors"))
    if arguments.json:
        write_json(
            {
                "event": "quantized",
                "path": str(destination),
                "weights": arguments.to,
                "calibrated": moments is not None,
                "merged": merge is not None,
                "bytes": {"before": before, "after": after},
                "seconds": seconds,
                "errors": [
                    {"layer": e.layer, "part": e.part, "relative": e.relative, "relative_before": e.relative_before}
                    for e in errors
                ],
            }
        )
        return
    print(_table(errors, moments is not None))
    print(f"{destination}: {format_bytes(before)} to {format_bytes(after)} as {arguments.to}, {seconds:.1f} s")


def _moments(source: Path, file: str, adapter: Adapter | None) -> dict[tuple[int, str], Tensor]:
    """The second moments of the products' inputs over the text of a file, whose special tokens count as such."""
    text = _text(Path(path("--calibrate", file)))
    model = DiffusionGemma.from_pretrained(source, device="cpu", adapter=adapter, merge=adapter is not None)
    if model.tokenizer is None:
        raise ValueError("--calibrate: the checkpoint has no tokenizer.json, which a text needs")
    ids = model.tokenizer.encode(text, special_tokens="tokens")
    if not ids:
        raise ValueError(f"--calibrate: {file} has no tokens; wants a text")
    size, done = len(text.encode()), 0

    def advance(tokens: int) -> None:
        nonlocal done
        before, done = done, done + tokens
        bar.advance(size * done // len(ids) - size * before // len(ids))

    with LoadProgress("calibrating", size, None, lines=True) as bar:
        return second_moments(model.network, ids, advance)


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            raw = stream.read(_LARGEST_TEXT + 1)
        if len(raw) > _LARGEST_TEXT:
            raise ValueError(f"--calibrate: {file} has more than {_LARGEST_TEXT:,} bytes; wants a shorter text")
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--calibrate: {file} cannot be read as text: {error}") from error


def _table(errors: list[PartError], calibrated: bool) -> str:
    """Relative errors: a line for each layer, and one over all layers; of each part under the scales of the largest
    magnitudes, and as written."""
    parts = [part for part in PARTS if any(error.part == part for error in errors)]
    by_place = {(error.layer, error.part): error for error in errors}
    weighed = ", columns weighed by their inputs" if calibrated else ""
    lines = [
        f"||quantized - plain|| / ||plain||{weighed}; before: by the largest value",
        f"{'layer':>5}" + "".join(f"{part:>18}" for part in parts),
        f"{'':>5}" + f"{'before':>11}{'now':>7}" * len(parts),
    ]
    for layer in sorted({error.layer for error in errors}):
        lines.append(f"{layer:>5}" + "".join(_cell(by_place.get((layer, part))) for part in parts))
    totals = []
    for part in parts:
        total = PartError(-1, part)
        for error in errors:
            if error.part == part:
                total.add(error)
        totals.append(_cell(total))
    lines.append(f"{'all':>5}" + "".join(totals))
    return "\n".join(lines)


def _cell(error: PartError | None) -> str:
    return f"{'-':>18}" if error is None else f"{error.relative_before:>11.4f}{error.relative:>7.4f}"
