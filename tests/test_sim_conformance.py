"""The effect of each device wrapper: the table of tests/sim/conformance, on the host, and on a GPU if there is one."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from cuda_tools import find_nvcc
from gpu_build import conformance_command
from sim.build import SIM, SUPPORTED, sim_library, sim_program

SOURCES = sorted((SIM / "conformance").glob("*.cu"))
CASES = [
    "shuffles and votes",
    "load_tiles",
    "store_tiles",
    "mma_m16n8k16",
    "mma_m16n8k32_e4m3",
    "mma_m16n8k32_int8",
    "rounding to bfloat16",
    "multiply-add of bfloat16",
    "multiplication of bfloat16",
    "permuted bytes",
    "special functions",
    "named barriers",
    "mbarrier phases",
    "mbarrier phases and bytes",
    "cp_async",
    "cp_async_mbarrier_arrive",
    "mbarrier_arrive_times",
    "bulk load and store",
    "cluster",
    "last block",
    "TMA, two dimensions",
    "TMA, three and four dimensions",
    "TMA, strides that shrink",
    "TMA, multicast",
    "wgmma shapes, A shared",
    "wgmma shapes, A in registers",
    "wgmma shapes of e4m3",
    "wgmma A k-major, B k-major",
    "wgmma A k-major, B n-major",
    "wgmma A m-major, B k-major",
    "wgmma A m-major, B n-major",
    "wgmma A in registers, B n-major",
]

# Starting a process on a GPU takes one or two of them.
CASE_SECONDS = 20

on_host = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = sim_library("conformance", SOURCES)
    library.conformance_name.restype = ctypes.c_char_p
    library.conformance_run.restype = ctypes.c_char_p
    return library


@on_host
def test_the_table_is_whole(library: ctypes.CDLL) -> None:
    assert [library.conformance_name(i).decode() for i in range(library.conformance_count())] == CASES


@on_host
@pytest.mark.parametrize("case", CASES)
def test_host_does_what_the_table_claims(library: ctypes.CDLL, case: str) -> None:
    for seed in range(1, 6):
        library.sim_set_seed(ctypes.c_uint64(seed))
        message = library.conformance_run(CASES.index(case))
        assert message is None, f"seed {seed}: {message.decode()}"


@on_host
def test_the_program_runs_one_case_or_lists_them() -> None:
    program = sim_program("conformance", SOURCES)

    def said(*words: str) -> tuple[int, list[str]]:
        done = subprocess.run([program, *words], capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout.splitlines()

    assert said("list") == (0, [f"{number} {name}" for number, name in enumerate(CASES)])
    number = CASES.index("permuted bytes")
    status, (line,) = said(str(number))
    assert (status, line.split()) == (0, [str(number), "permuted", "bytes", "ok"])
    for word in (str(len(CASES)), "-1", "cp_async", "99999999999999999999"):
        assert said(word) == (2, [f"got {word}, wants list or a number from 0 to {len(CASES) - 1}"])


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program for this machine's GPU."""
    import torch

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the table is compiled for 9.0a: it holds wgmma")
    built = os.environ.get("DGEMMA_CONFORMANCE")  # what tools/gpu_build.py made before
    if built:
        return Path(built)
    program = tmp_path_factory.mktemp("conformance") / "conformance"
    nvcc = find_nvcc()
    assert nvcc is not None, "a GPU run needs nvcc"
    subprocess.run(conformance_command(nvcc, "90a", program), check=True)
    return program


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_does_what_the_table_claims(on_gpu: Path, case: str) -> None:
    """Each case in a process of its own: one that hangs or faults fails alone."""
    command = [on_gpu, str(CASES.index(case))]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CASE_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the case has not ended after {CASE_SECONDS} s")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].endswith(" ok")
