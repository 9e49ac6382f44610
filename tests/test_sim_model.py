"""The bundled models answer puzzles with every operator run by the CUDA kernels on the host, as they do on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sim.build import SUPPORTED
from sim.extension import run_on_kernels
from solve_puzzles import answers

PUZZLES = 8
# bfloat16 sums in another order may change a draft, and all that follows.
DIFFERENT_AT_MOST = 1

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")


@pytest.mark.parametrize("compute_capability", [80, 90])
def test_a_bundled_model_solves_puzzles_on_the_kernels(compute_capability: int) -> None:
    script = Path(__file__).parent / "solve_puzzles.py"
    printed = run_on_kernels(script, "6", str(PUZZLES), compute_capability=compute_capability)
    got, wanted = json.loads(printed), answers(6, PUZZLES)
    assert sum(answer["solved"] for answer in wanted) >= PUZZLES - 1
    different = [(g, w) for g, w in zip(got, wanted, strict=True) if g != w]
    assert len(different) <= DIFFERENT_AT_MOST, different


def test_a_bundled_model_in_int8_solves_puzzles_on_the_kernels() -> None:
    """Experts, attention and MLP: sums of integers are the CPU's, all else is rounded as in bfloat16."""
    script, count = Path(__file__).parent / "solve_puzzles.py", 3
    got = json.loads(run_on_kernels(script, "6", str(count), "cpu", "int8", compute_capability=80))
    wanted = answers(6, count, weights="int8")
    assert sum(answer["solved"] for answer in wanted) == count
    assert sum(g != w for g, w in zip(got, wanted, strict=True)) <= DIFFERENT_AT_MOST, got
