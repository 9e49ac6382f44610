"""The plots of a report: tokens per second against the batch, a step against the prefix, and the floor of each part.

Functions that need no matplotlib choose the figures. A CPU's report is drawn without the published figures, under
names and titles that say so.

"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any

from report_peers import PEERS, RATE, STEP, Peer

from dgemma_ext.profile import chart

# Colours by weights; the legend names them too.
_COLOURS = {"bfloat16": "#466891", "fp8": "#4d9da8", "int4": "#c98a2b", "transformers": "#7a7a7a"}
_DOTS_PER_INCH = 144


@dataclass
class Series:
    """The points of one line: x → y."""

    label: str
    colour: str
    points: dict[int, float] = field(default_factory=dict)


def _good(report: Mapping[str, Any], kind: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The sizes and figures of the measured points of a kind."""
    return [(e["point"], e) for e in report["points"].values() if e["point"]["kind"] == kind and "error" not in e]


def rate_series(report: Mapping[str, Any], steps: int, prefix: int) -> list[Series]:
    """Tokens per second against the batch, with a fixed number of steps: a line for each model and for transformers."""
    found: dict[str, Series] = {}
    for kind in ("fixed", "transformers"):
        for point, entry in _good(report, kind):
            if (point["steps"], point["prefix"]) != (steps, prefix):
                continue
            label = f"{point['weights']}, {point['experts']} experts hit"
            colour = _COLOURS["transformers" if kind == "transformers" else point["weights"]]
            label = (
                f"transformers, static cache{', compiled' * entry['compiled']}: {label}" if kind != "fixed" else label
            )
            found.setdefault(label, Series(label, colour)).points[point["batch"]] = entry["tokens_per_second"]
    return list(found.values())


def step_series(report: Mapping[str, Any], steps: int) -> list[Series]:
    """Milliseconds of a step against the prefix, one canvas."""
    found: dict[str, Series] = {}
    for point, entry in _good(report, "fixed"):
        if (point["steps"], point["batch"]) == (steps, 1):
            label = f"{point['weights']}, {point['experts']} experts hit"
            series = found.setdefault(label, Series(label, _COLOURS[point["weights"]]))
            series.points[point["prefix"]] = 1e3 * entry["step_seconds"]
    return list(found.values())


def floor_shares(report: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """Model → part → (seconds, floor / seconds), for one canvas at the longest profiled prefix."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    longest: dict[str, int] = {}
    for point, entry in _good(report, "profile"):
        label = f"{point['weights']}, {point['experts']} experts hit, prefix {point['prefix']:,}"
        model = f"{point['weights']} {point['experts']}"
        if point["batch"] != 1 or point["flat"] or longest.get(model, 0) > point["prefix"]:
            continue
        found = {name: parts for name, parts in found.items() if not name.startswith(label.split(", prefix")[0])}
        longest[model] = point["prefix"]
        rows = [row for row in entry["step"]["parts"] if row["floor_seconds"] is not None and row["seconds"] > 0]
        found[label] = {row["part"]: (row["seconds"], row["floor_seconds"] / row["seconds"]) for row in rows}
    return found


def peers_of(report: Mapping[str, Any], axis: str, steps: int | None) -> list[Peer]:
    """The published figures to draw beside a report's: none for a CPU or for small sizes."""
    if report["kind"] != "gpu" or report["scale"] != "full":
        return []
    return [peer for peer in PEERS if peer.axis == axis and (axis == STEP or peer.steps == steps)]


def write_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws the plots. Raises ValueError where there is no matplotlib, and for a CPU's figures in docs/."""
    chart.require()
    if report["kind"] == "cpu" and folder.resolve().is_relative_to(Path(__file__).resolve().parent.parent / "docs"):
        raise ValueError(f"{folder} is for plots of a GPU; these figures are a CPU's")
    drawn: list[Path] = []
    prefixes = sorted({point["prefix"] for point, _ in _good(report, "fixed")})
    counts = sorted({point["steps"] for point, _ in _good(report, "fixed")})
    if prefixes:
        drawn += [_rates(report, folder, steps, prefixes[0]) for steps in counts]
        drawn.append(_steps(report, folder, counts[0]))
    if floor_shares(report):
        drawn.append(_floors(report, folder))
    return drawn


def _rates(report: Mapping[str, Any], folder: Path, steps: int, prefix: int) -> Path:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        lines = rate_series(report, steps, prefix)
        _lines(axes, lines, peers_of(report, RATE, steps))
        axes.set_xscale("log", base=2)
        batches = sorted({batch for line in lines for batch in line.points})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_xlabel("requests side by side")
        axes.set_ylabel("tokens per second, prefill not counted")
        axes.set_ylim(bottom=0)

    title = f"Tokens per second, {steps} fixed steps a canvas, prefix {prefix}"
    return _figure(report, folder, f"batch-{steps}-steps", 8.0, 6.4, title, draw)


def _steps(report: Mapping[str, Any], folder: Path, steps: int) -> Path:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        lines = step_series(report, steps)
        _lines(axes, lines, peers_of(report, STEP, None))
        axes.set_xscale("log", base=2)
        prefixes = sorted({prefix for line in lines for prefix in line.points})
        axes.set_xticks(prefixes, [f"{prefix:,}" for prefix in prefixes])
        axes.set_xlabel("tokens of the prefix")
        axes.set_ylabel("ms of a denoising step")
        axes.set_ylim(bottom=0)

    return _figure(report, folder, "prefix", 8.0, 6.4, "One denoising step, one canvas", draw)


def _floors(report: Mapping[str, Any], folder: Path) -> Path:
    from dgemma_ext.profile.parts import Part

    models = floor_shares(report)

    columns = min(3, len(models))
    rows = -(-len(models) // columns)

    def draw(figure: Any) -> None:
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in grid[len(models) :]:
            axes.set_visible(False)
        for axes, (label, parts) in zip(grid, models.items(), strict=False):
            places = list(range(len(parts)))
            # A share above one: the operator does not read, or keeps on the chip, some of the counted bytes.
            shares = [100 * min(share, 1.0) for _, share in parts.values()]
            axes.barh(places, shares, color=_COLOURS[label.split(",")[0]], alpha=0.7)
            for place, (seconds, share) in zip(places, parts.values(), strict=True):
                axes.text(2, place, f"{100 * share:.0f} %, {1e3 * seconds:.3g} ms", va="center", fontsize=7)
            axes.set_yticks(places, [Part(name).label for name in parts], fontsize=7)
            axes.invert_yaxis()
            axes.set_xlim(0, 100)
            axes.set_xlabel("floor / time, per cent", fontsize=8)
            axes.set_title(label, fontsize=8, loc="left")

    return _figure(report, folder, "floor", 4.4 * columns, 3.6 * rows + 0.4, "How near to its floor each part is", draw)


def _lines(axes: Any, lines: list[Series], peers: list[Peer]) -> None:
    for line in sorted(lines, key=lambda line: line.label):
        dashes = "--" if "84" in line.label else "-"
        xs = sorted(line.points)
        axes.plot(xs, [line.points[x] for x in xs], dashes, marker="o", ms=4, color=line.colour, label=line.label)
    markers = "sD^vP*X"
    labels = list(dict.fromkeys(peer.label for peer in peers))
    for number, label in enumerate(labels):
        mine = [peer for peer in peers if peer.label == label]
        words = fill(f"{label}: {mine[0].conditions.partition('; derived')[0]} [{mine[0].source}]", 110)
        places = ([peer.at for peer in mine], [peer.value for peer in mine])
        axes.plot(*places, ":", marker=markers[number % len(markers)], color="#b03a48", ms=6, label=words)
    if lines or peers:
        axes.legend(fontsize=7, frameon=False, handlelength=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _figure(
    report: Mapping[str, Any],
    folder: Path,
    name: str,
    width: float,
    height: float,
    title: str,
    draw: Callable[[Any], None],
) -> Path:
    cpu = report["kind"] == "cpu"
    figure = chart.new_figure(width, height)
    draw(figure)
    marked = "CPU: PROVES THE CODE, NOT A SPEED. " * cpu
    sizes = (
        "random weights of the true size" if report["scale"] == "full" else f"random weights, {report['scale']} sizes"
    )
    figure.suptitle(f"{marked}{title}; {report['device']}, {sizes}, commit {report['commit']}", fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{'cpu-' * cpu}{name}.png"
    figure.savefig(file, dpi=_DOTS_PER_INCH, format="png")
    return file
