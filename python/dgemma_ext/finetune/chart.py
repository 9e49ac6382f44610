"""A chart of a run: its loss, and the share of answers that are right beside the steps that they take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Two colours of cli/palette.py that differ in grey and for every form of colour blindness.
_RIGHT, _STEPS = "#466891", "#6bb6a8"
_DOTS_PER_INCH = 144


def require() -> None:
    """Raises ValueError, naming the extra to install, where there is no matplotlib."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a chart needs matplotlib, which is not installed: pip install 'dgemma_ext[finetune]'")


def write(lines: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """Draws the lines of a run's log as PNG or SVG, by the file's suffix. Raises ValueError where there is no
    matplotlib."""
    require()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    # An SVG with the same content is the same file.
    matplotlib.rcParams["svg.hashsalt"] = "dgemma finetune"
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    found = [line for line in lines if "exact_match" in line]
    axes.set_xlabel("optimizer steps")
    axes.spines[["top"]].set_visible(False)
    if found:
        steps = [line["step"] for line in found]
        right = axes.plot(steps, [line["exact_match"] for line in found], "o-", color=_RIGHT, label="answers right")
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("answers that are right", color=_RIGHT)
        other = axes.twinx()
        taken = [line["denoising_steps"] for line in found]
        drawn = other.plot(steps, taken, "s--", color=_STEPS, label="denoising steps of an answer")
        other.set_ylim(0, 1.1 * max(taken))
        other.set_ylabel("denoising steps of an answer", color=_STEPS)
        other.spines[["top"]].set_visible(False)
        axes.legend(handles=[*right, *drawn], frameon=False, loc="center right", fontsize=8)
    elif losses:
        axes.plot(*zip(*losses, strict=True), color=_RIGHT, linewidth=1)
        axes.set_ylabel("loss, nats")
    axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(file, dpi=_DOTS_PER_INCH, metadata={"Date": None} if file.suffix == ".svg" else None)
