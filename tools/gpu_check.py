"""Builds for the NVIDIA GPU of this machine, runs the suite on it, probes and measures it: `make gpu-check`.

    make gpu-check                                  all parts, one after the other
    make gpu-check ARGS="--part suite -k sampler"   one part (more with more --part); the rest goes to pytest

Parts, each of some minutes on 16 cores (every one builds first, which takes no time when nothing changed):

    probe        tools/probe.cu: what this GPU does with the instructions that the kernels rest on
    conformance  the device wrappers against the table that the host's test bed claims
    operators    every operator on the GPU against the oracle, and the model against transformers
    suite        everything else that runs without a GPU, with this build
    sanitizer    compute-sanitizer over the operators, memcheck and racecheck, where it is installed
    bench        bench/ on the GPU; writes bench/results/<device>.json and prints a table
    report       only when it is named (`make report`): bench/full_report.py, which gets the rest of the arguments

It needs nothing from the network and no virtual environment: the Python that runs it must hold torch 2.11 or later
with CUDA, pytest with pytest-benchmark, and what builds the package (scikit-build-core, pybind11, cmake, ninja); nvcc
must be on the PATH, under CUDA_HOME or in /usr/local/cuda. Everything it makes, but the results, lies in build/gpu.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from build import cuda_defines
from cuda_tools import OPERATOR_TESTS, architecture, find_nvcc, find_tool

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu"
SITE = FOLDER / "site"
PARTS = ("probe", "conformance", "operators", "suite", "sanitizer", "bench")
NAMED_ONLY = ("report",)
# The tests that use the GPU; the others only use this build.
ON_GPU = "gpu"
# compute-sanitizer runs these: every kernel, at small sizes.
SANITIZED = "kernel_is_right or test_canvas or test_causal or append or heads_and_dimensions or product_and_statistics"
SANITIZED += " or test_statistics or sparse_or_dense or test_dense or test_route or random_canvases or allowed"
SANITIZED += " or formats_mix or moe_ffn_fp8_is_right"
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


def fail(message: str) -> int:
    print(f"gpu-check: {message}", file=sys.stderr)
    return 1


def run(title: str, command: list[str], **environment: str) -> bool:
    """Runs a command; returns whether it succeeded, and prints how long it took."""
    print(f"\n== {title}", flush=True)
    began = time.monotonic()
    python_path = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    settings = {**os.environ, "PYTHONPATH": python_path, "DGEMMA_GPU": "1", **environment}
    status = subprocess.run(command, cwd=ROOT, env=settings, check=False).returncode
    print(
        f"== {title}: {'passed' if status == 0 else f'status {status}'} in {time.monotonic() - began:.0f} s", flush=True
    )
    return status == 0


def in_parallel(most: int) -> list[str]:
    """pytest-xdist's option, where it is installed."""
    workers = min(most, os.cpu_count() or 1)
    return ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []


def build(nvcc: str, code: str) -> bool:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    install += ["--disable-pip-version-check", "--upgrade", "--target", str(SITE), f"-Cbuild-dir={FOLDER / 'cmake'}"]
    return run("build", [*install, *cuda_defines(nvcc, [code]), "."])


def probe(nvcc: str, code: str, _arguments: list[str]) -> bool:
    program = str(FOLDER / "probe")
    compile_it = [nvcc, "-std=c++20", "-O3", "-gencode", f"arch=compute_{code},code=sm_{code}", "-o", program]
    return run("compile the probe", [*compile_it, "tools/probe.cu"]) and run("what this GPU does", [program])


def conformance(_nvcc: str, _code: str, arguments: list[str]) -> bool:
    return run("conformance", [*PYTEST, "tests/test_sim_conformance.py", "-m", ON_GPU, *arguments])


def operators(_nvcc: str, _code: str, arguments: list[str]) -> bool:
    tests = [f"tests/{name}" for name in OPERATOR_TESTS]
    passed = run("operators on the GPU", [*PYTEST, *tests, *arguments], DGEMMA_TEST_BACKEND="cuda")
    models = [f"tests/test_gpu_{name}.py" for name in ("model", "loop", "embed_c", "profile")]
    return run("model on the GPU", [*PYTEST, *models, "--durations=5", *arguments]) and passed


def suite(_nvcc: str, _code: str, arguments: list[str]) -> bool:
    return run("suite", [*PYTEST, "-m", f"not {ON_GPU}", *in_parallel(12), *arguments])


def sanitizer(_nvcc: str, _code: str, arguments: list[str]) -> bool:
    sanitize = find_tool("compute-sanitizer")
    if sanitize is None:
        print("\n== sanitizer: compute-sanitizer is not installed, NOT RUN", flush=True)
        return True
    # Small cases with an allocation for each tensor: torch's pool would hide accesses beyond one.
    tests = [*PYTEST, *(f"tests/{name}" for name in OPERATOR_TESTS), "-k", SANITIZED, *arguments]
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "DGEMMA_TEST_BACKEND": "cuda"}
    passed = True
    for tool in ("memcheck", "racecheck"):
        command = [sanitize, "--tool", tool, "--error-exitcode", "66", "--kernel-name", "kns=dgemma", *tests]
        passed = run(tool, command, **settings) and passed
    return passed


def bench(_nvcc: str, _code: str, arguments: list[str]) -> bool:
    raw = str(FOLDER / "bench.json")
    names = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
    measured = run("bench", [*PYTEST, "bench", *names, "-m", ON_GPU, f"--benchmark-json={raw}", *arguments])
    return measured and run("report", [sys.executable, "bench/report.py", raw])


def report(_nvcc: str, _code: str, arguments: list[str]) -> bool:
    return run("full report", [sys.executable, "bench/full_report.py", *arguments])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", add_help=False)
    parser.add_argument("--part", action="append", choices=[*PARTS, *NAMED_ONLY])
    chosen, rest = parser.parse_known_args(arguments)
    try:
        import torch
    except ImportError:
        return fail(f"{sys.executable} has no torch (PYTHON=... chooses another interpreter)")
    if not torch.cuda.is_available():
        return fail(f"no NVIDIA GPU is visible to torch {torch.__version__} of {sys.executable}")
    nvcc = find_nvcc()
    if nvcc is None:
        return fail("nvcc 13 was not found on the PATH, under CUDA_HOME or in /usr/local/cuda")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return fail(f"compute capability {major}.{minor}: the kernels are for 8.0 and later")
    code = architecture(major, minor)
    print(f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}; torch {torch.__version__}; {nvcc}")

    FOLDER.mkdir(parents=True, exist_ok=True)
    if not build(nvcc, code):
        return fail("the build failed")
    parts = {
        "probe": probe,
        "conformance": conformance,
        "operators": operators,
        "suite": suite,
        "sanitizer": sanitizer,
        "bench": bench,
        "report": report,
    }
    failures = [name for name in chosen.part or PARTS if not parts[name](nvcc, code, rest)]
    if failures:
        return fail(f"failed: {', '.join(failures)}")
    print(f"gpu-check: passed ({', '.join(chosen.part or PARTS)})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
