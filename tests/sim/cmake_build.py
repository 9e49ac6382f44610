"""CMake's build of the kernels for the host (cmake/Sim.cmake), whole or in parts, in build/sim/extension/build.

Its objects are linked into the Python module (extension.py) and into the libraries of single families (build.py).
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "sim" / "extension"
BUILD = FOLDER / "build"


@contextmanager
def locked() -> Iterator[None]:
    """One process at a time, also among several runs of the suite."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str]) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {**os.environ, "PATH": path}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


@cache
def _configure() -> None:
    command = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DDGEMMA_SIM=ON", "-DDGEMMA_PYTHON=ON"]
    _run([*command, "-DDGEMMA_WARNINGS_AS_ERRORS=ON", f"-DPython_EXECUTABLE={sys.executable}"])


def make(*targets: str) -> None:
    """Builds these, or everything, as far as it has changed; the caller holds the lock."""
    _configure()
    _run(["cmake", "--build", str(BUILD), *(["--target", *targets] if targets else [])])


def objects(sources: Sequence[Path]) -> list[Path]:
    """The compiled files of these sources: kernels and launch plans of csrc, and the test bed."""

    def path(source: Path) -> str:
        library = "dgemma" if source.suffix == ".cpp" and source.is_relative_to(ROOT / "csrc") else "dgemma_sim"
        return f"CMakeFiles/{library}.dir/{source.relative_to(ROOT)}.o"

    paths = [path(source) for source in sources]
    with locked():
        make(*paths)
    return [BUILD / path for path in paths]
