"""The profile of a step on a GPU: its kernels are found, and have the same parts as on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dgemma_ext as dg
from dgemma_ext import demo
from dgemma_ext.profile import profile, trace
from dgemma_ext.profile.parts import Part

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("batch", [1, 3])
def test_kernels_make_up_the_parts(batch: int, tmp_path: Path) -> None:
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(9), device="cuda")
    found = profile(model, steps=3, prefix=100, batch=batch)
    assert [row.part for row in found.step.rows] == list(Part)
    for row in found.step.rows[:-1]:
        # The head's kernel computes the statistics; sampling and update are kernels.
        assert row.seconds > 0, row
    assert sum(row.seconds for row in found.step.rows) == pytest.approx(found.step.seconds)
    kernels = sum(piece.seconds for piece in found.step.slices) / found.step.repeats
    # The steps are driven by Python, because kernels of a graph may overlap.
    assert 0 < kernels < found.step.unwatched_seconds
    assert found.driven_seconds == found.step.seconds
    assert all(piece.kernels for piece in found.step.slices)
    on_cpu = profile(dg.DiffusionGemma.from_pretrained(demo.checkpoint(9), device="cpu"), 3, 100, batch, batched=True)
    wanted = {(piece.part, piece.name, piece.layer) for piece in on_cpu.step.slices if piece.name == "moe_ffn"}
    assert {(piece.part, piece.name, piece.layer) for piece in found.step.slices if piece.name == "moe_ffn"} == wanted
    trace.write(found, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_the_device_is_measured() -> None:
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cuda")
    machine = profile(model, steps=1, prefix=20).machine
    assert 5e10 < machine.bandwidth < 2e13
    assert 5e12 < machine.peaks["plain"] < 1e16
