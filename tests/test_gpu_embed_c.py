"""The example on a GPU, from a checkpoint's files to solved puzzles; `make gpu-check` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from c_interface import build_folder, load, run
from dgemma_ext import demo
from test_c_library import EXAMPLE, answer, configure_and_build, drawn

pytestmark = pytest.mark.gpu

PUZZLES = 8
# bfloat16 sums in another order may change a draft, and all that follows.
DIFFERENT_AT_MOST = 1


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert load().dgemma_has_cuda(), "this build has no CUDA kernels"
    folder = tmp_path_factory.mktemp("embed_c")
    run("cmake", "--install", build_folder(), "--component", "c", "--prefix", folder / "prefix")
    configure_and_build(EXAMPLE, folder / "build", folder / "prefix")
    return folder / "build" / "embed_c"


@pytest.mark.parametrize("size", [6, 9])
def test_puzzles_are_solved_as_on_the_cpu(example: Path, size: int) -> None:
    folder = demo.checkpoint(size)
    different, solved = 0, 0
    for seed in range(PUZZLES):
        on_gpu = answer(example, folder, drawn(size, seed), "--seed", seed, "--device", "cuda")
        on_cpu = answer(example, folder, drawn(size, seed), "--seed", seed)
        different += on_gpu[1] != on_cpu[1]
        solved += bool(demo.check(on_gpu[2].replace("\n", ""), drawn(size, seed)))
    assert different <= DIFFERENT_AT_MOST
    assert solved >= PUZZLES - 1


def test_a_commit_on_the_gpu(example: Path) -> None:
    _, tokens, _ = answer(example, demo.checkpoint(6), drawn(6, 1), "--seed", 1, "--device", "cuda", "--canvases", 2)
    assert len(tokens) == 2 * 37
