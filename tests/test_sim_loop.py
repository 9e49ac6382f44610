"""The loop of a canvas on the CUDA kernels, on the host: batches, frozen rows, and the kernel that ends the loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sim.build import SUPPORTED
from sim.extension import run_on_kernels, run_tests_on_kernels

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")
PUZZLES = 3


@pytest.mark.parametrize(("compute_capability", "seed"), [(80, 1), (90, 2)])
def test_puzzles_in_a_batch_are_solved_as_one_by_one(compute_capability: int, seed: int) -> None:
    script = Path(__file__).parent / "loop_on_kernels.py"
    found = json.loads(run_on_kernels(script, str(PUZZLES), compute_capability=compute_capability, seed=seed))
    finishing = {steps for (steps,) in found["steps"]}
    assert len(finishing) > 1, "rows must finish at different steps"
    # All begin together, so there are as many steps as the longest canvas has, and a loop for every step that ends one.
    right = {"different": [], "steps": max(finishing), "runs": len(finishing)}
    assert found["eager"] == right
    assert found["graph"] == right
    # When the first canvas is done, the extra step that is queued is a step of the others.
    assert found["async"] == right
    assert found["until 3"] == 3, "a launch makes no more steps than it was told"


def test_the_kernels_freeze_what_is_finished() -> None:
    run_tests_on_kernels("tests/test_canvas_batch.py", "-k", "frozen or would_be_alone", seed=3)


def test_the_kernels_hold_the_rules_of_every_request_in_a_batch() -> None:
    run_tests_on_kernels("tests/test_loop.py", "-k", "rules_of_their_own", seed=4)


def test_the_kernels_take_the_images_of_a_batch() -> None:
    run_tests_on_kernels("tests/test_image_requests.py", "-k", "every_driver and graph", seed=6)


def test_a_step_of_a_batch_reads_no_value_and_launches_no_more_kernels() -> None:
    """A captured step cannot wait for the host. csrc/cuda/NOTES.md has the counts."""
    counts = json.loads(run_on_kernels(Path(__file__).parent / "count_launches.py"))
    one, four = (counts[f"rows {rows}, step 2"] for rows in (1, 4))
    assert (one["waits"], four["waits"]) == (0, 0)
    # A request alone is split to fill the GPU, and in each of the 30 layers its parts are combined. Four fill it.
    assert four["kernels"] == one["kernels"] - 30
    assert four["torch"] <= one["torch"] + 1  # the flags of the rows, copied out to their positions
    ruled = counts["rows 4, with a grammar"]
    assert ruled["waits"] == 0
    assert ruled["kernels"] == four["kernels"] + 5
    assert ruled["torch"] <= four["torch"] + 9
    # In int8 a kernel rounds what another multiplies: for 7 weights of a layer, 6 in the 5 full layers, which are
    # torch's products otherwise, and twice among the experts' kernels.
    products, first, in_int8 = 25 * 7 + 5 * 6, counts["rows 4, step 1"], counts["rows 4, step 1, in int8"]
    assert (in_int8["waits"], in_int8["kernels"]) == (0, first["kernels"] + 2 * products + 2 * 30)
    assert in_int8["torch"] == first["torch"] - products
    # A gather of a layer's factors, and two products for each of its 7 weights, 6 in the 5 full layers.
    adapted = counts["rows 4, with an adapter"]
    assert (adapted["waits"], adapted["kernels"]) == (0, four["kernels"])
    assert adapted["torch"] == four["torch"] + 30 + 2 * (25 * 7 + 5 * 6)
