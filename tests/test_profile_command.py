"""`dgemma profile`: its table, JSON, chart and trace, and its errors."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command import Run, dgemma, library_model, random_checkpoint
from dgemma_ext.profile import chart, profile, true_size
from dgemma_ext.profile.parts import Part
from profiles import SMALL

PREFIX = ["--prefix", "20", "--steps", "2"]


def profiled(*arguments: str) -> Run:
    run = dgemma("profile", *arguments)
    assert (run.code, run.err) == (0, "")
    return run


def test_help_fits() -> None:
    shown = dgemma("profile", "--help")
    assert shown.code == 0
    assert max(map(len, shown.out.splitlines())) <= 120
    flags = "steps prefix batch weights dtype device context json chart trace layers experts-hit flat"
    for flag in flags.split():
        assert f" --{flag} " in shown.out


def test_the_table_has_a_row_for_every_part_and_sums_to_the_step() -> None:
    lines = profiled(random_checkpoint(), *PREFIX).out.splitlines()
    rows = {part: next(line for line in lines if line.startswith(part.label)) for part in Part}
    times = [float(re.split(r"\s{2,}", line)[1]) for line in rows.values()]
    (step,) = (line for line in lines if re.match(r"step\s", line))
    assert sum(times) == pytest.approx(float(re.split(r"\s{2,}", step)[1]), rel=0.02)
    shares = [float(re.split(r"\s{2,}", line)[2].removesuffix(" %")) for line in rows.values()]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert max(map(len, lines)) <= 120
    assert any(re.match(r"vision tower, an image of 280 tokens: [0-9.]+ ms, floor [0-9.]+ ms$", line) for line in lines)


def test_json_has_the_same_figures() -> None:
    found = profiled(random_checkpoint(), *PREFIX, "--batch", "2", "--weights", "fp8", "--json").object
    assert found["event"] == "profile"
    assert {key: found[key] for key in ("layers", "canvas", "prefix", "batch", "context", "weights", "dtype")} == {
        "layers": 3,
        "canvas": 8,
        "prefix": 20,
        "batch": 2,
        "context": 20,
        "weights": "fp8",
        "dtype": "bfloat16",
    }
    assert found["machine"]["bytes_per_second"] > 0
    assert found["machine"]["flops_per_second"]["plain"] > 0
    step = found["step"]
    assert [row["part"] for row in step["parts"]] == [part.value for part in Part]
    assert step["repeats"] == 2
    assert sum(row["seconds"] for row in step["parts"]) == pytest.approx(step["seconds"])
    assert sum(row["share"] for row in step["parts"]) == pytest.approx(1)
    assert sum(row["floor_seconds"] or 0 for row in step["parts"]) == pytest.approx(step["floor_seconds"])
    for row in step["parts"][:-1]:
        assert row["ratio"] == pytest.approx(row["seconds"] / row["floor_seconds"])
        assert row["bytes"] > 0
    assert step["parts"][-1] == step["parts"][-1] | {"bytes": None, "flops": None, "floor_seconds": None, "ratio": None}
    assert 0 < step["seconds_outside_operators"] < step["seconds"]
    assert step["unwatched_seconds"] > 0
    assert {row["part"] for row in found["encode"]["parts"]} < {part.value for part in Part}
    assert len(found["experts_hit"]) == 3
    tower = found["vision_tower"]
    assert tower["soft_tokens"] == 280
    assert 0 < tower["floor"] < tower["seconds"]
    assert found["vocabulary_tiles"] == 4


def test_a_random_model_needs_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for field, value in (SMALL | {"max_position_embeddings": 1024}).items():
        if field != "canvas_length":
            monkeypatch.setitem(true_size._TEXT, field, value)
    found = profiled("random", "--layers", "2", "--experts-hit", "12", "--flat", *PREFIX, "--json").object
    assert (found["layers"], found["canvas"], found["experts"]) == (2, 256, 16)
    assert max(found["experts_hit"]) <= 14
    # All three tiles of a flat distribution are needed.
    assert found["soft_tiles"] == [3.0, 3.0, 3.0]
    assert profiled("random", "--layers", "1", *PREFIX, "--weights", "int4", "--dtype", "float32").code == 0


def test_the_bundled_model_has_a_name() -> None:
    assert profiled("demo", *PREFIX, "--json").object["canvas"] == 82


# The trace ----------------------------------------------------------------------------------------------------------


def test_the_trace_nests(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    run = profiled(random_checkpoint(), *PREFIX, "--batch", "2", "--trace", str(file))
    assert run.out.endswith(f"written: {file}\n")
    trace = json.loads(file.read_text())
    events = trace["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"denoising step", "encode"}
    assert {event["ph"] for event in events} == {"M", "X"}
    slices = [event for event in events if event["ph"] == "X"]
    for event in slices:
        assert set(event) == {"name", "cat", "ph", "pid", "tid", "ts", "dur", "args"}
        assert event["dur"] >= 0
        assert event["ts"] >= 0
    for process, passes in ((1, 2), (2, 1)):
        mine = [event for event in slices if event["pid"] == process]
        assert sum(event["cat"] == "pass" for event in mine) == passes
        check_nesting(mine)
    parts = {event["name"] for event in slices if event["cat"] == "part"}
    assert parts == {part.label for part in Part}
    (first, *_) = (event for event in slices if event["name"] == "q_proj 0")
    assert set(first["args"]) == {"us", "bytes", "flops", "floor_us"}
    # Two requests make two calls of the first layer's projection, each with half of the work of both.
    assert first["args"]["flops"] == 2 * 8 * 64 * 64


def check_nesting(events: list[dict[str, Any]]) -> None:
    """Each slice is inside one of the kind above it, as viewers stack them: by begin, the longer first."""
    above = {"part": "pass", "operator": "part"}
    order = {"pass": 0, "part": 1, "operator": 2}
    stack: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"], order[e["cat"]])):
        while stack and round(stack[-1]["ts"] + stack[-1]["dur"], 3) <= event["ts"] and stack[-1]["dur"] > 0:
            stack.pop()
        while stack and order[stack[-1]["cat"]] >= order[event["cat"]]:
            ended = stack.pop()
            assert round(ended["ts"] + ended["dur"], 3) <= event["ts"], (ended, event)
        if stack:
            end = round(stack[-1]["ts"] + stack[-1]["dur"], 3)
            assert round(event["ts"] + event["dur"], 3) <= end, (stack[-1], event)
        if event["cat"] in above:
            assert stack, event
            assert stack[-1]["cat"] == above[event["cat"]], (stack[-1], event)
        stack.append(event)


# The chart ----------------------------------------------------------------------------------------------------------


def test_the_chart_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    file = tmp_path / "chart.png"
    profiled(random_checkpoint(), *PREFIX, "--chart", str(file))
    assert file.stat().st_size > 10_000
    # A chart whose floors are half of the times, drawn at full length.
    found = profile(library_model(), steps=1, prefix=20)
    rows = tuple(replace(row, seconds=1e-3, floor=5e-4 if row.floor else None) for row in found.step.rows)
    chart.write(replace(found, step=replace(found.step, rows=rows)), file, "half")
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(file)[..., :3]
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 800
    coloured = pixels.reshape(-1, 3)
    ink = float((coloured.min(axis=1) < 0.95).mean())
    assert 0.02 < ink < 0.6
    # Both kinds of bars, and black letters.
    for red, green, blue in ((0x6B, 0xB6, 0xA8), (0x46, 0x68, 0x91), (0, 0, 0)):
        near = (abs(coloured * 255 - (red, green, blue)) < 2).all(axis=1)
        assert near.sum() > 200, (red, green, blue)
        # The legend is on the right, where neither bars nor the parts' names are.
        left = near.reshape(pixels.shape[:2])[:, : pixels.shape[1] * 6 // 10]
        assert left.sum() > 1000, (red, green, blue)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    run = dgemma("profile", "/no/such/folder", "--chart", str(tmp_path / "chart.png"))
    assert (run.code, run.out) == (2, "")
    assert run.err == ("dgemma: a chart needs matplotlib, which is not installed: pip install 'dgemma_ext[report]'\n")


# What is refused ----------------------------------------------------------------------------------------------------


def bad_command_lines(model: str) -> dict[str, tuple[list[str], str]]:
    return {
        "no model": ([], "MODEL"),
        "no folder": (["/no/such/folder"], "/no/such/folder"),
        "no steps": ([model, "--steps", "0"], "--steps"),
        "no batch": ([model, "--batch", "0"], "--batch"),
        "no prefix": ([model, "--prefix", "0"], "--prefix"),
        "prefix that the model does not have": ([model, "--prefix", "4097"], "4096"),
        "prefix beyond the context": ([model, "--prefix", "30", "--context", "20"], "prefix must be in [1, 20]"),
        "context that the model does not have": ([model, "--context", "5000"], "4096"),
        "prefix beyond the published context": (["random", "--layers", "1", "--prefix", "300000"], "262144"),
        "device": ([model, "--device", "tpu"], "device"),
        "dtype": ([model, "--dtype", "int8"], "--dtype"),
        "weights": ([model, "--weights", "int5"], "weights must be one of auto"),
        "weights of random": (
            ["random", "--layers", "1", "--weights", "int5"],
            "weights must be one of auto",
        ),
        "layers of a folder": ([model, "--layers", "2"], "--layers is for MODEL random"),
        "experts of a folder": ([model, "--experts-hit", "2"], "--experts-hit is for MODEL random"),
        "flat folder": ([model, "--flat"], "--flat is for MODEL random"),
        "too few experts": (
            ["random", "--layers", "1", "--experts-hit", "7"],
            "must be an integer in [8, 129)",
        ),
        "too many layers": (["random", "--layers", "1000"], "fewer layers"),
        "chart that is no PNG": ([model, "--chart", "chart.svg"], ".png"),
        "chart in no folder": ([model, "--chart", "/no/such/chart.png"], "/no/such"),
        "trace that is no JSON": ([model, "--trace", "trace.txt"], ".json"),
    }


@pytest.mark.parametrize("what", bad_command_lines(""))
def test_bad_input_is_one_clear_line(what: str) -> None:
    arguments, piece = bad_command_lines(random_checkpoint())[what]
    run = dgemma("profile", *arguments)
    assert (run.code, run.out) == (2, "")
    assert re.fullmatch(r"dgemma[^\n]*\n", run.err), run.err
    assert piece in run.err
