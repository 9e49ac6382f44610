"""Builds for the NVIDIA GPU of this machine, runs the suite on it, probes and measures it: `make gpu-check`.

    make gpu-check                                  all parts, one after the other
    make gpu-check ARGS="--part suite -k sampler"   one part (more with more --part); the rest goes to pytest

Parts, the most telling first; each has a limit, and one that fails, faults or hangs does not end the others. Every run
builds first, which takes no time when nothing changed.

    probe        tools/probe.cu and tools/host_probe.py: what this GPU, its driver and torch do
    conformance  the device wrappers against the table that the host's test bed claims, a process for each case
    operators    every operator on the GPU against the oracle, a process for each file
    loop         canvases in CUDA graphs, whole models beside the CPU's and transformers'
    bench        bench/ on the GPU; writes bench/results/<device>.json and prints a table
    sanitizer    compute-sanitizer over the operators where it is installed: memcheck, racecheck, synccheck
    suite        everything else that runs without a GPU, with this build
    report       only when it is named (`make report`): bench/full_report.py, which gets the rest of the arguments

Where the GPU is there for minutes only, tools/first_light.sh runs these parts in ten of them.

It needs nothing from the network and no virtual environment: the Python that runs it must hold torch 2.11 or later
with CUDA, pytest with pytest-benchmark, and what builds the package (scikit-build-core, cmake, ninja); nvcc
must be on the PATH, under CUDA_HOME or in /usr/local/cuda. Everything it makes, but the results, lies in build/gpu.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gpu_build
from cuda_tools import OPERATOR_TESTS, architecture, find_nvcc, find_tool

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu"
# The tests that use the GPU; the others only use this build.
ON_GPU = "gpu"
# compute-sanitizer runs these: every kernel, at small sizes.
SANITIZED = "kernel_is_right or test_canvas or test_causal or append or heads_and_dimensions or product_and_statistics"
SANITIZED += " or test_statistics or sparse_or_dense or test_dense or test_route or random_canvases or allowed"
SANITIZED += " or formats_mix or moe_ffn_fp8_is_right or int8_experts or int8_dense"
TOOLS = ("memcheck", "racecheck", "synccheck")
NO_TESTS = 5  # pytest's status
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
# Seconds, several times what each is thought to take.
LIMITS = {
    "probe": 60,
    "host probe": 300,
    "conformance": 900,
    "operators": 900,  # of a file
    "loop": 1800,  # of a file
    "bench": 3600,
    "sanitizer": 3600,  # of a tool
    "suite": 3600,
    "report": 6 * 3600,
}
# A session that a fault or a hang ended is taken up again behind that test, so often.
SESSIONS = 3


def fail(message: str) -> int:
    print(f"gpu-check: {message}", file=sys.stderr)
    return 1


def run(
    title: str,
    command: Sequence[str],
    limit: float,
    environment: Mapping[str, str] | None = None,
    good: Sequence[int] = (0,),
) -> bool:
    """Whether the command ended within the limit, in seconds, with a good status; says how long it took. A command that
    does not is ended with all that it started."""
    print(f"\n== {title}", flush=True)
    began = time.monotonic()
    settings = {**gpu_build.environment(FOLDER), "DGEMMA_GPU": "1", **(environment or {})}
    process = subprocess.Popen(command, cwd=ROOT, env=settings, start_new_session=True)
    try:
        status = process.wait(limit)
        verdict = "passed" if status in good else f"status {status}"
    except subprocess.TimeoutExpired:
        status, verdict = None, "ended at its limit"
        _end(process)
    except BaseException:
        _end(process, signal.SIGINT)
        raise
    print(f"== {title}: {verdict} in {time.monotonic() - began:.0f} s", flush=True)
    return status in good


def _end(process: subprocess.Popen[bytes], first: signal.Signals = signal.SIGTERM) -> None:
    """Ends a process with its group; one that cannot be killed is left alone."""
    for word in (first, signal.SIGKILL):
        try:
            os.killpg(process.pid, word)
            process.wait(5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_tests(title: str, file: str, limit: float, arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """pytest over a file of tests, again behind the test that ended the process where one did."""
    begun = FOLDER / "tests_begun"
    begun.unlink(missing_ok=True)
    passed, end = True, time.monotonic() + limit
    for session in range(SESSIONS):
        again = "" if session == 0 else ", the rest of it"
        command = [*PYTEST, f"tests/{file}", *arguments]
        left = max(end - time.monotonic(), 1.0)
        # A file may hold none of the tests that -k names.
        settings = {**environment, "DGEMMA_TESTS_BEGUN": str(begun)}
        passed = run(title + again, command, left, settings, good=(0, NO_TESTS)) and passed
        if begun.exists() and "finished" in begun.read_text().splitlines():
            return passed
    return False


def in_parallel(most: int) -> list[str]:
    """pytest-xdist's option, where it is installed."""
    workers = min(most, os.cpu_count() or 1)
    return ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []


def all_of(results: list[bool]) -> bool:
    """After all of them have run."""
    return all(results)


def probe(_arguments: list[str]) -> bool:
    host = [sys.executable, "tools/host_probe.py"]
    return all_of(
        [
            run("what this GPU does", [str(FOLDER / "probe")], LIMITS["probe"]),
            run("what the loop rests on", host, LIMITS["host probe"]),
        ]
    )


def conformance(arguments: list[str]) -> bool:
    program = FOLDER / "conformance"
    settings = {"DGEMMA_CONFORMANCE": str(program)} if program.exists() else {}
    command = [*PYTEST, "tests/test_sim_conformance.py", "-m", ON_GPU, *arguments]
    return run("conformance", command, LIMITS["conformance"], settings)


def operators(arguments: list[str]) -> bool:
    settings = {"DGEMMA_TEST_BACKEND": "cuda"}
    limit = LIMITS["operators"]
    return all_of([run_tests(f"{file} on the GPU", file, limit, arguments, settings) for file in OPERATOR_TESTS])


def loop(arguments: list[str]) -> bool:
    files = [f"test_gpu_{name}.py" for name in ("loop", "model", "profile", "embed_c", "residency")]
    arguments = ["--durations=5", *arguments]
    return all_of([run_tests(f"{file} on the GPU", file, LIMITS["loop"], arguments, {}) for file in files])


def suite(arguments: list[str]) -> bool:
    return run("suite", [*PYTEST, "-m", f"not {ON_GPU}", *in_parallel(12), *arguments], LIMITS["suite"])


def sanitizer(arguments: list[str]) -> bool:
    sanitize = find_tool("compute-sanitizer")
    if sanitize is None:
        print("\n== sanitizer: compute-sanitizer is not installed, NOT RUN", flush=True)
        return True
    # Small cases with an allocation for each tensor: torch's pool would hide accesses beyond one.
    tests = [*PYTEST, *(f"tests/{name}" for name in OPERATOR_TESTS), "-k", SANITIZED, *arguments]
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "DGEMMA_TEST_BACKEND": "cuda"}
    options = ["--error-exitcode", "66", "--kernel-name", "kns=dgemma"]
    return all_of(
        [run(tool, [sanitize, "--tool", tool, *options, *tests], LIMITS["sanitizer"], settings) for tool in TOOLS]
    )


def bench(arguments: list[str]) -> bool:
    # Without -k and the like, whose words name benchmarks.
    first = [sys.executable, "bench/first_light.py"]
    alone = bool(arguments) or run("each kernel of a step", first, LIMITS["bench"])
    raw = str(FOLDER / "bench.json")
    names = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
    command = [*PYTEST, "bench", *names, "-m", ON_GPU, f"--benchmark-json={raw}", *arguments]
    measured = run("bench", command, LIMITS["bench"]) and run("report", [sys.executable, "bench/report.py", raw], 60)
    return measured and alone


def report(arguments: list[str]) -> bool:
    return run("full report", [sys.executable, "bench/full_report.py", *arguments], LIMITS["report"])


PARTS: dict[str, Callable[[list[str]], bool]] = {
    "probe": probe,
    "conformance": conformance,
    "operators": operators,
    "loop": loop,
    "bench": bench,
    "sanitizer": sanitizer,
    "suite": suite,
}
NAMED_ONLY: dict[str, Callable[[list[str]], bool]] = {"report": report}


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

    parts = chosen.part or list(PARTS)
    unbuilt = gpu_build.build(nvcc, code, FOLDER, programs=bool({"probe", "conformance"} & set(parts)))
    if "package" in unbuilt:
        return fail("the build failed")
    failures = [f"build of {name}" for name in unbuilt]
    failures += [name for name in parts if not {**PARTS, **NAMED_ONLY}[name](rest)]
    if failures:
        return fail(f"failed: {', '.join(failures)}")
    print(f"gpu-check: passed ({', '.join(parts)})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
