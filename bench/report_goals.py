"""The goals for one H200 and a canvas of 256 tokens, and their figures in a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from report_points import Point

LAYERS = 30
Points = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Goal:
    """At most `limit` (in `unit`). `measured`: the figure from a report's points; None where one is missing."""

    name: str
    limit: float
    unit: str
    measured: Callable[[Points], float | None]


def _entry(points: Points, point: Point) -> Mapping[str, Any] | None:
    found = points.get(point.name)
    return None if found is None or "error" in found else found


def _parts(names: Sequence[str], point: Point, scale: float) -> Callable[[Points], float | None]:
    """The seconds of some parts of a profiled step, times `scale`."""

    def measured(points: Points) -> float | None:
        entry = _entry(points, point)
        if entry is None:
            return None
        return scale * sum(row["seconds"] for row in entry["step"]["parts"] if row["part"] in names)

    return measured


def _step(weights: str, experts: int) -> Callable[[Points], float | None]:
    def measured(points: Points) -> float | None:
        entry = _entry(points, Point("fixed", weights, experts, 1, 128, steps=16))
        return None if entry is None else 1e3 * entry["step_seconds"]

    return measured


def _further_canvas(prefix: int) -> Callable[[Points], float | None]:
    """The time that each of seven more canvases adds to the step of one."""

    def measured(points: Points) -> float | None:
        one, eight = (_entry(points, Point("fixed", "bfloat16", 128, batch, prefix, steps=16)) for batch in (1, 8))
        return None if one is None or eight is None else 1e3 * (eight["step_seconds"] - one["step_seconds"]) / 7

    return measured


def _experts(weights: str, batch: int = 1) -> Callable[[Points], float | None]:
    return _parts(["experts"], Point("profile", weights, 128, batch, 128), 1e6 / LAYERS)


_AFTER_LAYERS = ("head", "sampling", "soft_embedding")
_ATTENTION = ("attention_sliding", "attention_full")
# "Gaps" are the step's wall time without its kernels.
_DENSE = ("embedding", "norms", "projections", "router", "mlp", "other")

GOALS: tuple[Goal, ...] = (
    Goal("experts of a layer, bf16, 256 tokens, 128 hit", 370, "us", _experts("bfloat16")),
    Goal("experts of a layer, fp8, 256 tokens, 128 hit", 195, "us", _experts("fp8")),
    Goal("experts of a layer, 4 bits, 256 tokens, 128 hit", 125, "us", _experts("int4")),
    Goal("experts of a layer, bf16, 1,024 tokens", 420, "us", _experts("bfloat16", 4)),
    Goal("experts of a layer, bf16, 2,048 tokens", 540, "us", _experts("bfloat16", 8)),
    Goal("experts of a layer, bf16, 4,096 tokens", 800, "us", _experts("bfloat16", 16)),
    Goal(
        "head to soft embedding, flat distributions",
        1.35,
        "ms",
        _parts(_AFTER_LAYERS, Point("profile", "bfloat16", 128, 1, 128, flat=True), 1e3),
    ),
    Goal(
        "head to soft embedding, peaked distributions",
        0.8,
        "ms",
        _parts(_AFTER_LAYERS, Point("profile", "bfloat16", 128, 1, 128), 1e3),
    ),
    Goal("attention, prefix 4K", 0.75, "ms", _parts(_ATTENTION, Point("profile", "bfloat16", 128, 1, 4096), 1e3)),
    Goal("attention, prefix 8K", 1.1, "ms", _parts(_ATTENTION, Point("profile", "bfloat16", 128, 1, 8192), 1e3)),
    Goal(
        "dense projections, norms, router, gaps, bf16",
        1.9,
        "ms",
        _parts(_DENSE, Point("profile", "bfloat16", 128, 1, 128), 1e3),
    ),
    Goal(
        "dense projections, norms, router, gaps, fp8",
        1.2,
        "ms",
        _parts(_DENSE, Point("profile", "fp8", 128, 1, 128), 1e3),
    ),
    Goal("whole step, fp8, 84 experts hit", 7.5, "ms", _step("fp8", 84)),
    Goal("whole step, fp8, 128 experts hit", 9.5, "ms", _step("fp8", 128)),
    Goal("whole step, bf16, 84 experts hit", 12, "ms", _step("bfloat16", 84)),
    Goal("whole step, bf16, 128 experts hit", 15.5, "ms", _step("bfloat16", 128)),
    Goal("whole step, 4-bit experts, 84 hit", 7, "ms", _step("int4", 84)),
    Goal("whole step, 4-bit experts, 128 hit", 8, "ms", _step("int4", 128)),
    Goal("each further canvas, bf16, prefix 128", 3.4, "ms", _further_canvas(128)),
    Goal("each further canvas, bf16, prefix 8K", 4.2, "ms", _further_canvas(8192)),
)


def judged(report: Mapping[str, Any]) -> list[tuple[Goal, float | None, bool | None]]:
    """Every goal with its figure, and whether it is met: None where it was not measured, or not on an H200."""
    of_goals = report["scale"] == "full" and "H200" in report["device"]
    found: list[tuple[Goal, float | None, bool | None]] = []
    for goal in GOALS:
        value = goal.measured(report["points"]) if report["scale"] == "full" else None
        found.append((goal, value, value <= goal.limit if value is not None and of_goals else None))
    return found


def goal_lines(report: Mapping[str, Any]) -> list[str]:
    """The goals as a table."""
    words = {True: "met", False: "MISSED", None: "-"}
    rows = [("goal for one H200", "at most", "measured", "")]
    for goal, value, met in judged(report):
        measured = "-" if value is None else f"{value:.3g} {goal.unit}"
        rows.append((goal.name, f"{goal.limit:g} {goal.unit}", measured, words[met]))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return ["", *lines]
