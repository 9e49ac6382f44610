"""Builds dgemma_ext into the Python that runs this, as an editable installation: `make build`.

    tools/build.py          with the CUDA kernels where an NVIDIA GPU or nvcc 13 is at hand
    tools/build.py --cuda   with them in any case: the compiler is fetched from the package index where there is none
    tools/build.py --cuda --strict   ends at a compiler's warning: what the test suite runs on

DGEMMA_CUDA=1 in the environment is --cuda, DGEMMA_CUDA=0 leaves the kernels out. They are compiled for the GPUs of this
machine, or for 8.0 and 9.0 where there is none; DGEMMA_CUDA_ARCHITECTURES="80;89" chooses others.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from cuda_tools import architectures_of_gpus, find_nvcc, named_architectures

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
# The default without a GPU; 90 comes last, so that later GPUs get it as PTX.
DEFAULT_ARCHITECTURES = ["80", "90a"]


def packages_exist() -> bool:
    """Whether the package index has the compiler for this machine."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64", "aarch64")


def cuda_compiler(demanded: bool) -> str | None:
    """nvcc for this build, downloaded where it is wanted and missing; None builds without CUDA."""
    nvcc = find_nvcc()
    if nvcc is not None or not (demanded or architectures_of_gpus()):
        return nvcc
    if not packages_exist():
        print("no CUDA compiler for this machine: building without the CUDA kernels", flush=True)
        return None
    print("installing requirements/cuda.txt", flush=True)
    subprocess.run([*PIP, "-r", str(ROOT / "requirements" / "cuda.txt")], check=True)
    find_nvcc.cache_clear()
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("tools/build.py: requirements/cuda.txt is installed, and no nvcc 13 was found")
    return nvcc


def cuda_defines(nvcc: str | None, architectures: list[str]) -> list[str]:
    """CMake's settings as arguments for pip."""
    if nvcc is None:
        return ["-Ccmake.define.DGEMMA_CUDA=OFF"]
    return [
        "-Ccmake.define.DGEMMA_CUDA=ON",
        f"-Ccmake.define.CMAKE_CUDA_COMPILER={nvcc}",
        f"-Ccmake.define.DGEMMA_CUDA_ARCHITECTURES={';'.join(architectures)}",
    ]


def chosen_architectures() -> list[str]:
    named = os.environ.get("DGEMMA_CUDA_ARCHITECTURES")
    return named_architectures(named) if named else architectures_of_gpus() or DEFAULT_ARCHITECTURES


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--cuda"], ["--cuda", "--strict"]):
        print(__doc__, file=sys.stderr)
        return 2
    wish = os.environ.get("DGEMMA_CUDA", "")
    nvcc = None if wish == "0" else cuda_compiler(demanded=bool(arguments) or wish not in ("", "0"))
    architectures = chosen_architectures()
    what = "without CUDA kernels" if nvcc is None else f"with CUDA kernels for {', '.join(architectures)}, by {nvcc}"
    print(f"building dgemma_ext {what}", flush=True)
    # Named in any case, because a build folder keeps what an earlier build was told.
    strict = f"-Ccmake.define.DGEMMA_WARNINGS_AS_ERRORS={'ON' if '--strict' in arguments else 'OFF'}"
    defines = [*cuda_defines(nvcc, architectures), strict]
    install = [*PIP, "--no-build-isolation", "--no-deps", "--no-index", *defines, "-e", "."]
    return subprocess.run(install, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
