"""`make report`: its points, its resume, its goals, its plots, and one of every kind measured at small size."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import full_report
import report_measure
from report_goals import GOALS, goal_lines, judged
from report_peers import PEERS, RATE, STEP
from report_plots import floor_shares, peers_of, rate_series, step_series, write_plots
from report_points import FULL, SMALL, Point, points

from dgemma_ext.profile.parts import Part

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does")


def report(*arguments: str, folder: Path) -> int:
    places = ["--results", str(folder / "report.json"), "--plots", str(folder / "plots")]
    return full_report.main(["--small", *places, *arguments])


def entries(folder: Path) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return dict(saved["points"])


# Points -------------------------------------------------------------------------------------------------------------


def test_the_axes() -> None:
    found = points(FULL)
    assert len(found) == len({point.name for point in found})
    for weights in ("bfloat16", "fp8", "int4"):
        for experts in (84, 128):
            mine = [point for point in found if point.model == (weights, experts)]
            fixed = [point for point in mine if point.kind == "fixed"]
            assert {p.batch for p in fixed if (p.steps, p.prefix) == (16, 128)} == {1, 2, 4, 8, 16, 32}
            prefixes = {p.prefix for p in fixed if (p.steps, p.batch) == (16, 1)}
            assert prefixes >= {128, 1024, 4096, 8192, 16_384, 32_768, 65_536}
            assert {p.batch for p in fixed if (p.steps, p.prefix) == (48, 128)} >= {1, 8}
            assert {p.batch for p in mine if p.kind == "adaptive"} == {1, 8}
            assert {p.prefix for p in mine if p.kind == "profile"} >= {4096, 8192}
    assert {p.batch for p in found if p.kind == "transformers"} == {1, 4, 8}


def test_the_most_telling_points_come_first() -> None:
    found = points(FULL)
    assert [point.name for point in found[:4]] == [
        "fixed bfloat16 experts-128 batch-1 prefix-128 steps-16",
        "profile bfloat16 experts-128 batch-1 prefix-128",
        "fixed bfloat16 experts-128 batch-4 prefix-128 steps-16",
        "fixed bfloat16 experts-128 batch-8 prefix-128 steps-16",
    ]
    # Every model has its first points before any has its second ones; each is made twice at most.
    assert {point.model for point in found[:24]} == set(FULL.models)
    mine = [point for point in found if point.kind != "transformers"]
    assert sum(a.model != b.model for a, b in pairwise(mine)) == 2 * len(FULL.models) - 1
    # Those of transformers, which may compile for minutes, are last.
    assert found[len(mine) :] == [point for point in found if point.kind == "transformers"]


def test_small_has_every_kind() -> None:
    assert {point.kind for point in points(SMALL)} == {point.kind for point in points(FULL)}


# Measuring ------------------------------------------------------------------------------------------------------------


def test_one_point_of_every_kind_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for words in ("transformers", "profile prefix-96 bfloat16", "prefill prefix-32 int4", "fixed steps-2 int4"):
        assert report("--only", words, folder=tmp_path) == 0
    found = entries(tmp_path)
    assert {entry["point"]["kind"] for entry in found.values()} == {"transformers", "profile", "prefill", "fixed"}
    for entry in found.values():
        assert "error" not in entry, entry
        if entry["point"]["kind"] == "profile":
            assert [row["part"] for row in entry["step"]["parts"]] == [part.value for part in Part]
            continue
        assert entry["tokens_per_second"] > 0
        if entry["point"]["kind"] == "fixed":
            assert entry["step_seconds"] > 0
            # On a busy machine such short times are only reliable in their signs.
            assert entry["canvas_seconds"] > 0
            assert entry["commit_seconds"] > -entry["step_seconds"]
            tokens = 32 * entry["point"]["batch"]
            assert entry["tokens_per_second"] == pytest.approx(tokens / entry["canvas_seconds"])
    saved = json.loads((tmp_path / "report.json").read_text())
    assert (saved["kind"], saved["scale"], saved["device"]) == ("cpu", "small", "cpu")
    assert all(file.name.startswith("cpu-") for file in (tmp_path / "plots").iterdir())


def test_adaptive_counts_the_steps_that_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from dgemma_ext.checkpoint import GenerationDefaults

    measurer = report_measure.Measurer(SMALL, "cpu")
    point = Point("adaptive", "bfloat16", 16, 2, 32)
    model = measurer._model_of(point)
    values = vars(model.defaults) | {"max_denoising_steps": 3, "confidence_threshold": 0.0}
    monkeypatch.setattr(model, "defaults", GenerationDefaults(**values))
    found = measurer.measure(point)
    assert found["denoising_steps"] == 3
    assert found["tokens_per_second"] >= found["tokens_per_second_with_prefill"] > 0


def test_a_second_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    wanted = [point.name for point in points(SMALL) if point.kind == "fixed"]
    assert len(wanted) == 10
    asked: list[str] = []
    failing, interrupting = {wanted[1], wanted[5]}, {wanted[4]}

    def measure(self: Any, point: Point) -> dict[str, Any]:
        asked.append(point.name)
        if point.name in failing:
            raise torch.OutOfMemoryError("no\nroom")
        if point.name in interrupting:
            raise KeyboardInterrupt
        return {"step_seconds": 0.5, "tokens_per_second": 2.0}

    monkeypatch.setattr(report_measure.Measurer, "measure", measure)
    assert report("--only", "fixed", folder=tmp_path) == 130
    assert asked == wanted[:5]
    # Every point before the interrupt is kept, the failed one with its message.
    assert list(entries(tmp_path)) == wanted[:4]
    assert entries(tmp_path)[wanted[1]]["error"] == "OutOfMemoryError: no room"
    interrupting.clear()
    del asked[:]
    assert report("--only", "fixed", folder=tmp_path) == 0
    assert asked == [wanted[1], *wanted[4:]]
    assert "10 points, 3 of them measured before" in capsys.readouterr().out
    failing.clear()
    del asked[:]
    assert report("--only", "fixed", folder=tmp_path) == 0
    assert asked == [wanted[1], wanted[5]]
    del asked[:]
    assert report("--only", "fixed", folder=tmp_path) == 0
    assert asked == []
    assert not any("error" in entry for entry in entries(tmp_path).values())


TRANSFORMERS = Point("transformers", "bfloat16", 16, 1, 32, steps=2)


def as_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str) -> None:
    """Puts a program in the place of transformers' process."""
    (folder / "report_transformers.py").write_text(f"import os, sys, time\n{program}\n")
    monkeypatch.setattr(report_measure, "__file__", str(folder / "report_measure.py"))


def test_transformers_process_is_ended_at_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    as_worker(monkeypatch, tmp_path, "print('compiling', file=sys.stderr, flush=True); time.sleep(600)")
    measurer = report_measure.Measurer(SMALL, "cpu", deadline=0.0)
    with pytest.raises(RuntimeError, match="was ended after 1 s: "):
        measurer.measure(TRANSFORMERS)
    as_worker(monkeypatch, tmp_path, "sys.exit('no such class')")
    with pytest.raises(RuntimeError, match="ended with status 1: no such class"):
        report_measure.Measurer(SMALL, "cpu").measure(TRANSFORMERS)


def test_what_transformers_gave_before_it_was_ended_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The uncompiled run comes first."""
    line = '{"tokens_per_second": 7.0, "compiled": false}'
    as_worker(monkeypatch, tmp_path, f"print('words'); print('{line}', flush=True); os.kill(os.getpid(), 9)")
    found = report_measure.Measurer(replace(SMALL, compile_transformers=True), "cpu").measure(TRANSFORMERS)
    assert found["tokens_per_second"] == 7.0
    assert found["note"] == "not compiled: the process ended with status -9"


def test_minutes_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report_measure.Measurer, "measure", lambda *_: pytest.fail("measured"))
    report("--minutes", "0", folder=tmp_path)
    assert "0 minutes are over; the next run goes on" in capsys.readouterr().out
    report("--draw", folder=tmp_path)


def test_bad_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert full_report.main([]) == 2
    assert 'ARGS="--small"' in capsys.readouterr().err
    assert report("--only", "sing", folder=tmp_path) == 2
    assert "no point has all of sing" in capsys.readouterr().err
    (tmp_path / "report.json").write_text(json.dumps(fake_report()))
    assert report("--draw", folder=tmp_path) == 2
    printed = capsys.readouterr().err
    assert "is of NVIDIA H200, full; this would be of cpu, small" in printed
    assert printed.count("\n") == 1


# Goals ----------------------------------------------------------------------------------------------------------------


def fake_report(**changes: Any) -> dict[str, Any]:
    """A report with every point of the full scale: a step of 10 ms and a further canvas of 3 ms; parts of 0.2 ms."""
    measured: dict[str, Any] = {}
    for point in points(FULL):
        step = 1e-3 * (10 + 3 * (point.batch - 1))
        rows = [
            {"part": part.value, "seconds": 2e-4, "floor_seconds": None if part is Part.OTHER else 1e-4}
            for part in Part
        ]
        measured[point.name] = {
            "point": point.fields(),
            "step_seconds": step,
            "tokens_per_second": 256 * point.batch / (16 * step),
            "forward_seconds": 3 * step,
            "compiled": True,
            "denoising_steps": 12.0,
            "step": {"seconds": step, "floor_seconds": 1e-3, "parts": rows},
        }
    about = {"device": "NVIDIA H200", "kind": "gpu", "scale": "full", "commit": "none", "torch": "2.13.0"}
    return {**about, "points": measured, **changes}


def test_every_goal_can_be_judged() -> None:
    """Each goal finds its points in a report, whose figures are made up here."""
    found = {goal.name: (value, met) for goal, value, met in judged(fake_report())}
    assert len(found) == len(GOALS) == 20
    assert all(value is not None and met is not None for value, met in found.values())
    assert found["whole step, bf16, 84 experts hit"] == (pytest.approx(10), True)
    assert found["whole step, fp8, 128 experts hit"] == (pytest.approx(10), False)
    assert found["each further canvas, bf16, prefix 128"] == (pytest.approx(3), True)
    # 0.2 ms in 30 layers are 6.7 us a layer.
    assert found["experts of a layer, bf16, 256 tokens, 128 hit"] == (pytest.approx(200 / 30), True)
    assert found["attention, prefix 4K"] == (pytest.approx(0.4), True)
    assert found["head to soft embedding, flat distributions"] == (pytest.approx(0.6), True)
    assert found["dense projections, norms, router, gaps, bf16"] == (pytest.approx(1.2), True)
    lines = goal_lines(fake_report())
    assert sum(line.endswith(" met") for line in lines) + sum(line.endswith(" MISSED") for line in lines) == 20


def test_goals_without_measurement_or_h200_are_not_judged() -> None:
    for changes in ({"points": {}}, {"device": "cpu", "scale": "small", "kind": "cpu"}):
        assert {value for _, value, _ in judged(fake_report(**changes))} == {None}
    assert {met for _, _, met in judged(fake_report(device="NVIDIA H100"))} == {None}
    broken = fake_report()
    for entry in broken["points"].values():
        entry["error"] = "out of memory"
    assert {value for _, value, _ in judged(broken)} == {None}


# Plots ----------------------------------------------------------------------------------------------------------------


def test_series_of_the_plots() -> None:
    found = fake_report()
    rates = {series.label: series.points for series in rate_series(found, 16, 128)}
    assert set(rates["fp8, 84 experts hit"]) == {1, 2, 4, 8, 16, 32}
    assert rates["fp8, 84 experts hit"][1] == pytest.approx(1600)
    assert set(rates["transformers, static cache, compiled: bfloat16, 128 experts hit"]) == {1, 4, 8}
    assert len(rates) == 6 + 2
    steps = {series.label: series.points for series in step_series(found, 16)}
    assert steps["int4, 128 experts hit"][65_536] == pytest.approx(10)
    shares = floor_shares(found)
    assert len(shares) == 6
    assert all(label.endswith("prefix 8,192") for label in shares)
    assert shares["fp8, 84 experts hit, prefix 8,192"]["experts"] == (pytest.approx(2e-4), pytest.approx(0.5))


def test_published_figures_stand_beside_those_of_a_gpu_alone() -> None:
    found = fake_report()
    at_16 = {peer.label: peer.value for peer in peers_of(found, RATE, 16)}
    assert at_16 == {"vLLM, one H200, fp8": 1288.0, "vLLM, one H100, fp8": 1008.0}
    # The published curve: tokens of a canvas per second, with 48 steps.
    curve = {(peer.label.split()[0], peer.at): round(peer.value) for peer in peers_of(found, RATE, 48)}
    assert {curve["vLLM", batch] for batch in (1, 4, 8)} == {450, 799, 920}
    assert len(peers_of(found, STEP, None)) == 6
    assert all(peer.conditions and peer.source for peer in PEERS)
    for changes in ({"kind": "cpu"}, {"scale": "small"}):
        assert peers_of(fake_report(**changes), RATE, 16) == []


def test_a_cpu_s_figures_are_not_drawn_where_a_gpu_s_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    docs = Path(__file__).resolve().parent.parent / "docs" / "report"
    with pytest.raises(ValueError, match="a CPU's"):
        write_plots(fake_report(kind="cpu"), docs)
    assert not docs.exists() or not list(docs.glob("cpu-*"))


def test_plots_are_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    files = write_plots(fake_report(), tmp_path)
    assert [file.name for file in files] == ["batch-16-steps.png", "batch-48-steps.png", "prefix.png", "floor.png"]
    for file in files:
        pixels = imread(file)[..., :3]
        assert min(pixels.shape[:2]) > 500
        assert 0.01 < float((pixels.min(axis=-1) < 0.9).mean()) < 0.6
