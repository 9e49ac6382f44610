"""Builds for the NVIDIA GPU of this machine, runs the suite on it and probes it: `make gpu-check`.

It needs nothing from the network and no virtual environment: the Python that runs it must hold torch 2.11 or later with
CUDA, pytest, and what builds the package (scikit-build-core, pybind11, cmake, ninja); nvcc must be on the PATH or under
CUDA_HOME. Everything it makes lies in build/gpu. Extra arguments go to pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu"


def fail(problem: str) -> int:
    print(f"gpu-check: {problem}", file=sys.stderr)
    return 1


def run(title: str, command: list[str], environment: dict[str, str] | None = None) -> int:
    print(f"\n== {title}", flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **(environment or {})}, check=False).returncode


def main(pytest_arguments: list[str]) -> int:
    try:
        import torch
    except ImportError:
        return fail(f"{sys.executable} has no torch (PYTHON=... chooses another interpreter)")
    if not torch.cuda.is_available():
        return fail(f"no NVIDIA GPU is visible to torch {torch.__version__} of {sys.executable}")
    nvcc = find_nvcc()
    if nvcc is None:
        return fail("nvcc was not found on the PATH, under CUDA_HOME or in /usr/local/cuda")

    major, minor = torch.cuda.get_device_capability()
    # 9.0a has what is Hopper's alone (wgmma, setmaxnreg); other GPUs are served by the portable kernels.
    architecture = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    print(f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}; torch {torch.__version__}; {nvcc}")

    FOLDER.mkdir(parents=True, exist_ok=True)
    probe = str(FOLDER / "probe")
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    build_probe = [nvcc, "-std=c++20", "-O3", "-gencode", code, "-o", probe, "tools/probe.cu"]
    failures = []
    if run("probe", build_probe) != 0 or run("what this GPU does", [probe]) != 0:
        failures.append("probe")

    site = str(FOLDER / "site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    install += ["--disable-pip-version-check", "--upgrade", "--target", site, f"-Cbuild-dir={FOLDER / 'cmake'}"]
    install += ["-Ccmake.define.DGEMMA_CUDA=ON", f"-Ccmake.define.DGEMMA_CUDA_ARCHITECTURES={architecture}"]
    install += [f"-Ccmake.define.CMAKE_CUDA_COMPILER={nvcc}", "."]
    if run("build", install) != 0:
        return fail("the build failed")

    environment = {
        "DGEMMA_GPU": "1",
        "PYTHONPATH": os.pathsep.join([site, os.environ.get("PYTHONPATH", "")]).rstrip(":"),
    }
    if run("suite", [sys.executable, "-m", "pytest", *pytest_arguments], environment) != 0:
        failures.append("suite")
    if failures:
        return fail(f"failed: {', '.join(failures)}")
    print("gpu-check: passed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
