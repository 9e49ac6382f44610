"""The Python package over the CUDA kernels run on the host: built by CMake in build/sim, used in a process of its own.

text = run_on_kernels(Path("tests/solve_puzzles.py"), "6", "8")      # what the script prints
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from sim.cmake_build import BUILD, FOLDER, ROOT, locked, make

# Put in front of a program: the package of this build comes before one that is installed as editable, whose import hook
# would win.
PRELUDE = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path[:0] = [{str(FOLDER / "site")!r}, {str(ROOT / "tests")!r}]
import dgemma_ext._C
assert dgemma_ext._C.__file__.startswith({str(FOLDER)!r}), dgemma_ext._C.__file__
"""


@cache
def build() -> None:
    """Builds what changed, one process at a time."""
    with locked():
        make()
        # Replaced only where it is not up to date: another run of tests may have it open.
        package, python = FOLDER / "site" / "dgemma_ext", ROOT / "python" / "dgemma_ext"
        (module,) = BUILD.glob("_C*.so")
        copy = package / module.name
        entries = {entry.name for entry in python.iterdir() if entry.suffix != ".so"} - {"__pycache__"}
        is_same = copy.exists() and copy.stat().st_mtime_ns == module.stat().st_mtime_ns
        if is_same and {entry.name for entry in package.iterdir()} - {"__pycache__"} == entries | {copy.name}:
            return
        shutil.rmtree(package, ignore_errors=True)
        package.mkdir(parents=True)
        for name in entries:
            (package / name).symlink_to(python / name)
        shutil.copy2(module, copy)


def run_tests_on_kernels(*arguments: str, compute_capability: int = 90, seed: int = 1, watch: bool = False) -> None:
    """Runs pytest with these arguments on the CUDA kernels, watched with `watch` or DGEMMA_TEST_WATCH=1."""
    script = ROOT / "tests" / "sim" / "run_tests.py"
    watch = watch or os.environ.get("DGEMMA_TEST_WATCH") == "1"
    run_on_kernels(script, *arguments, compute_capability=compute_capability, seed=seed, watch=watch)


def run_on_kernels(
    script: Path, *arguments: str, compute_capability: int = 90, seed: int = 1, watch: bool = False
) -> str:
    """Runs a Python script whose operators are the CUDA kernels on the host; gives what it prints.

    `watch`: also checks the kernels' ordinary loads and stores, and where tensors end.
    """
    build()
    program = PRELUDE + (
        "import ctypes, runpy\n"
        "_machine = ctypes.CDLL(dgemma_ext._C.__file__)\n"
        f"if {watch}: _machine.sim_watch_tensors(), _machine.sim_watch_plain_accesses(1)\n"
        f"_machine.sim_set_gpu({compute_capability}, 3)\n"
        f"_machine.sim_set_seed(ctypes.c_uint64({seed}))\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    environment = {**os.environ, "DGEMMA_TEST_BACKEND": "sim", "DGEMMA_TEST_GPU": str(compute_capability)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout
