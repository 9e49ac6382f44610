"""A chart of a step: for each part its time as a bar, with its floor inside."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma_ext.profile.timeline import ratio_text

if TYPE_CHECKING:
    from dgemma_ext.profile.run import Profile

# Two colours of cli/palette.py that differ in grey and for every form of colour blindness.
_TIME, _FLOOR = "#6bb6a8", "#466891"
_DOTS_PER_INCH = 144


def require() -> None:
    """Raises ValueError, naming the extra to install, where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a chart needs matplotlib, which is not installed: pip install 'dgemma_ext[report]'")


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, inches wide and high, that needs no display. Raises as `require` does."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write(found: Profile, file: Path, title: str) -> None:
    """Draws the step of a profile as a PNG. Raises ValueError where there is no matplotlib."""
    step = found.step
    rows = step.rows
    figure = new_figure(9.0, 1.4 + 0.42 * len(rows))
    axes = figure.subplots()
    places = list(range(len(rows)))
    times = [row.seconds * 1e3 for row in rows]
    floors = [(row.floor or 0.0) * 1e3 for row in rows]
    axes.barh(places, times, height=0.72, color=_TIME, label="time")
    axes.barh(places, floors, height=0.32, color=_FLOOR, label="floor: bytes or FLOPs at best")
    for place, row, time, floor in zip(places, rows, times, floors, strict=True):
        ratio = "" if row.ratio is None else f", {ratio_text(row.ratio)} x floor"
        axes.text(max(time, floor), place, f" {time:.3g} ms{ratio}", va="center", fontsize=8)
    axes.set_yticks(places, [row.part.label for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms of a step")
    # Leaves room for the label of the longest bar.
    axes.set_xlim(0, 1.28 * max(*times, *floors))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    canvases = "one canvas" if found.batch == 1 else f"{found.batch} canvases"
    axes.set_title(
        f"{title}: {step.seconds * 1e3:.3g} ms a step, floor {step.floor * 1e3:.3g} ms\n"
        f"{found.device}; {found.dtype}, {found.layers} layers, {canvases} of {found.canvas}, prefix {found.prefix:,}",
        fontsize=9,
        loc="left",
    )
    figure.savefig(file, dpi=_DOTS_PER_INCH, format="png")
