"""Measures the random model of the true size beside transformers and the published figures: `make report`.

    make report                                     on a GPU: all points; a second run goes on
    make report ARGS="--minutes 8"                  begins no point after so long, and ends transformers then
    make report ARGS="--only profile --only fp8"    points whose names hold all of these words
    make report ARGS="--small"                      small sizes, on a CPU in a minute: proves the code, not a speed
    make report ARGS="--draw"                       measures nothing, draws what there is

Each point is saved when it is measured (bench/results/<device>-report.json), a failure with its words, which the next
run tries again. The most telling points come first, those of transformers last. Then come the goals with what was met,
and the plots: of a GPU at full size in docs/report, of anything else in build/report and marked as such.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from report_goals import goal_lines
from report_points import FULL, KINDS, SMALL, Point, Scale, points

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="small sizes; the default, and all there is, on a CPU")
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="points whose names hold all WORDs")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no point after so many minutes")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, metavar="FILE", help="where to save (default: as above)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where to draw (default: as above)")
    chosen = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and not chosen.small:
        print('make report: no GPU is visible to torch; ARGS="--small" runs small sizes on the CPU', file=sys.stderr)
        return 2
    scale = SMALL if chosen.small else FULL
    wanted = [point for point in points(scale) if all(word in point.name.split() for word in _words(chosen.only))]
    if not wanted:
        print(f"make report: no point has all of {', '.join(chosen.only)}; kinds: {', '.join(KINDS)}", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if cuda else "cpu"
    file: Path = chosen.results or ROOT / "bench" / "results" / f"{_slug(device, scale)}-report.json"
    try:
        report = load(file, device, scale)
    except ValueError as error:  # also when JSON is not valid
        print(f"make report: {error}", file=sys.stderr)
        return 2
    try:
        if not chosen.draw:
            run(report, wanted, scale, "cuda" if cuda else "cpu", file, chosen.minutes)
    except KeyboardInterrupt:
        print("\nmake report: interrupted; the next run goes on", file=sys.stderr)
        return 130
    print("\n".join(goal_lines(report)))
    print_points(report)
    return draw(report, chosen.plots or ROOT / ("docs" if cuda and not chosen.small else "build") / "report")


def _words(only: Sequence[str]) -> list[str]:
    return [word for text in only for word in text.split()]


def _slug(device: str, scale: Scale) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return name if scale is FULL else f"{name}-{scale.name}"


# The file -----------------------------------------------------------------------------------------------------------


def load(file: Path, device: str, scale: Scale) -> dict[str, Any]:
    """The report so far, or a new one. Raises ValueError for one of another device or scale."""
    kind = "cpu" if device == "cpu" else "gpu"
    about = {"device": device, "kind": kind, "scale": scale.name, "torch": torch.__version__, "commit": _commit()}
    if not file.exists():
        return {**about, "points": {}}
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if (report["device"], report["scale"]) != (device, scale.name):
        raise ValueError(f"{file} is of {report['device']}, {report['scale']}; this would be of {device}, {scale.name}")
    return {**report, "torch": about["torch"], "commit": about["commit"]}


def save(report: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def _commit() -> str:
    version = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        said = subprocess.run(version, capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):  # no git, or a folder without history
        said = ""
    return said.strip() or "unknown"


# Measuring ----------------------------------------------------------------------------------------------------------


def run(
    report: dict[str, Any], wanted: Sequence[Point], scale: Scale, device: str, file: Path, minutes: float | None
) -> None:
    """Measures the points that are missing or failed, and saves after every point."""
    from report_measure import Measurer

    began = time.monotonic()
    measurer = Measurer(scale, device, began + 60 * minutes if minutes is not None else float("inf"))
    left = [point for point in wanted if "error" in report["points"].get(point.name, {"error": "not measured"})]
    print(f"{len(wanted)} points, {len(wanted) - len(left)} of them measured before")
    for number, point in enumerate(left, start=1):
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            print(f"{minutes:g} minutes are over; the next run goes on")
            break
        start = time.monotonic()
        try:
            figures = measurer.measure(point)
        except Exception as error:  # out of memory, or a failing peer: the other points can still be measured
            figures = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        entry = {"point": point.fields(), "commit": report["commit"], "date": time.strftime("%Y-%m-%d"), **figures}
        report["points"][point.name] = entry
        save(report, file)
        result = figures.get("error") or headline(entry)
        print(f"{number}/{len(left)} {point.name}: {result} ({time.monotonic() - start:.0f} s)", flush=True)


def headline(entry: dict[str, Any]) -> str:
    """The main figure of a point."""
    if entry["point"]["kind"] == "profile":
        step = entry["step"]
        return f"{step['seconds'] * 1e3:.4g} ms a step, floor {step['floor_seconds'] * 1e3:.4g} ms"
    rate = f"{entry['tokens_per_second']:.4g} tokens/s"
    if "step_seconds" in entry:
        return f"{entry['step_seconds'] * 1e3:.4g} ms a step, {rate}"
    if "forward_seconds" in entry:
        return f"{entry['forward_seconds'] * 1e3:.4g} ms a forward pass, {rate}"
    steps = f", {entry['denoising_steps']:.3g} steps a canvas" if "denoising_steps" in entry else ""
    return rate + steps


def print_points(report: dict[str, Any]) -> None:
    """Prints every measured point on a line, failures last."""
    entries = report["points"]
    if not entries:
        return
    width = max(map(len, entries))
    print(f"\n{report['device']}, {report['scale']} sizes" + (": a CPU proves the code" * (report["kind"] == "cpu")))
    for name in sorted(entries, key=lambda name: "error" in entries[name]):
        print(f"{name:{width}}  {entries[name].get('error') or headline(entries[name])}")


def draw(report: dict[str, Any], folder: Path) -> int:
    """Draws the plots; without matplotlib it prints which extra to install."""
    from report_plots import write_plots

    try:
        files = write_plots(report, folder)
    except ValueError as error:
        print(f"make report: {error}", file=sys.stderr)
        return 2
    for file in files:
        print(f"drawn: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
