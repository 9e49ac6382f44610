"""The effect of each device wrapper: the table of tests/sim/conformance, on the host, and on a GPU if there is one."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from sim.build import INCLUDE, SIM, SUPPORTED, find_nvcc, sim_library

SOURCES = sorted((SIM / "conformance").glob("*.cu"))
CASES = [
    "shuffles and votes",
    "load_tiles",
    "store_tiles",
    "mma_m16n8k16",
    "mma_m16n8k32_e4m3",
    "rounding to bfloat16",
    "multiply-add of bfloat16",
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


@pytest.mark.gpu
def test_gpu_does_what_the_table_claims(tmp_path: Path) -> None:
    import torch

    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        pytest.skip("the table is compiled for 9.0a: it holds wgmma")
    program = tmp_path / "conformance"
    code = "arch=compute_90a,code=sm_90a"
    nvcc = find_nvcc()
    assert nvcc is not None, "a GPU run needs nvcc"
    command = [nvcc, "-std=c++20", "-O3", "-gencode", code, *INCLUDE[1:], "--threads", "0", "-o", str(program)]
    subprocess.run([*command, *map(str, SOURCES)], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
