"""The calls by which csrc/device/graph.h makes a loop and destroys it, over stand-ins for CUDA's runtime."""

from __future__ import annotations

from pathlib import Path

import pytest

from c_interface import ROOT, run
from cuda_tools import find_nvcc

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="needs the headers that come with nvcc")

BUILD = ["load the kernel", "graph", "handle", "loop", "step", "stream", "begin", "kernel", "end", "instantiate"]
DESTROYED = ["destroy executable", "destroy graph", "destroy stream"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nvcc = find_nvcc()
    assert nvcc is not None
    file = tmp_path_factory.mktemp("graph_calls") / "program"
    strict = ["-std=c++20", "-Xcompiler=-Wall,-Wextra,-Werror", "-cudart", "none", f"-I{ROOT / 'csrc'}"]
    run(nvcc, *strict, ROOT / "tests" / "graph_calls.cpp", "-o", file)
    return file


def test_a_kernel_is_loaded_before_it_is_captured(program: Path) -> None:
    assert run(program).splitlines() == [*BUILD, "launch", *DESTROYED, "as before"]


@pytest.mark.parametrize("failing", [*BUILD, "launch"])
def test_a_call_that_fails_is_told_and_leaves_nothing(program: Path, failing: str) -> None:
    said = run(program, failing).splitlines()
    made = [*BUILD, "launch"]
    wanted = made[: made.index(failing) + 1]
    if failing == "kernel":
        wanted.append("end")  # a capture is ended in any case
    assert said[: len(wanted)] == wanted
    assert said[len(wanted)] == f"error: {'no such kernel' if failing == 'kernel' else 'not supported'}"
    assert set(said[len(wanted) + 1 : -1]) <= set(DESTROYED), "in a relaxed capture mode"
    assert said[-1] == "as before"
