"""The example program on a GPU's path: with the CUDA kernels, which the test bed runs on the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend import BACKEND
from c_interface import ROOT, run
from dgemma_ext import demo
from sim.build import SUPPORTED
from sim.extension import FOLDER, build

pytestmark = [
    pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++"),
    pytest.mark.skipif(BACKEND != "cpu", reason="starts the test bed itself"),
]

EXAMPLE = ROOT / "examples" / "embed_c"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build()
    folder = tmp_path_factory.mktemp("embed_c")
    strict = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic", "-DEMBED_WITH_CUDA"]
    include = [f"-I{ROOT / 'tests' / 'sim' / 'runtime'}", f"-I{ROOT / 'csrc' / 'include'}"]
    objects = []
    for source in sorted(EXAMPLE.glob("*.c")):
        objects.append(folder / f"{source.stem}.o")
        run("cc", *strict, *include, "-c", source, "-o", objects[-1])
    run("c++", *objects, FOLDER / "build" / "libdgemma.a", "-o", folder / "embed_c", "-lpthread")
    return folder / "embed_c"


def test_a_puzzle_is_solved_on_the_kernels(program: Path) -> None:
    puzzle = demo.draw(6, 1)
    lines = run(program, demo.checkpoint(6), puzzle.text, "--seed", "1", "--device", "cuda").split("\n", 3)
    assert lines[0] == "device cuda"
    assert demo.check(lines[3].replace("\n", ""), puzzle.text)
    # A second canvas reads the rows that the kernels appended after the first.
    longer = run(program, demo.checkpoint(6), puzzle.text, "--seed", "1", "--device", "cuda", "--canvases", "2")
    tokens = longer.split("\n")[2].split()
    assert len(tokens) == 1 + 2 * 37
