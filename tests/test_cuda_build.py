"""Every CUDA source compiled for every architecture, without spills; its machine code has what it is made for."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from cuda_tools import find_nvcc, find_tool
from sim.build import (
    FP8_MMA,
    FP8_MMA_ARCHITECTURES,
    PORTABLE,
    PORTABLE_ARCHITECTURES,
    ROOT,
    SIM,
    NvccReport,
    machine_code,
    nvcc_report,
)

CSRC = ROOT / "csrc"
FAMILIES = {"grouped_gemm", "block_attention", "denoise", "layer", "automaton"}
SOURCES = sorted(CSRC.rglob("*.cu"))


def has_kernel(source: Path) -> bool:
    """Whether a source, or a header that it includes, has a kernel."""
    text = source.read_text()
    headers = [CSRC / name for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE)]
    return any("__global__" in one for one in (text, *(path.read_text() for path in headers if path.exists())))


KERNELS = [source for source in SOURCES if has_kernel(source)]
HOPPER = [source for source in KERNELS if source.parent.name == "sm90"]
FP8_BY_MMA = [source for source in KERNELS if source.parent.name == "sm89"]
TENSOR_CORE_80 = [source for source in KERNELS if source.parent.name == "sm80"]

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
needs_disassembler = pytest.mark.skipif(
    find_tool("cuobjdump") is None or find_tool("nvdisasm") is None, reason="cuobjdump and nvdisasm are not installed"
)


def name_of(source: Path) -> str:
    return str(source.relative_to(CSRC).with_suffix(""))


def test_the_kernels_are_found() -> None:
    """An empty list would pass every test below."""
    assert {source.relative_to(CSRC).parts[0] for source in SOURCES} == {*FAMILIES, "cuda"}
    assert {source.parent.name for source in SOURCES} == {"cuda", "sm80", "sm89", "sm90"}
    assert HOPPER
    assert FP8_BY_MMA
    assert TENSOR_CORE_80


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_compiles_without_spills_or_local_memory(source: Path) -> None:
    made_for = {"sm89": (FP8_MMA, FP8_MMA_ARCHITECTURES), "sm90": ("90a", 1)}
    architecture, count = made_for.get(source.parent.name, (PORTABLE, PORTABLE_ARCHITECTURES))
    report = nvcc_report(source, architecture)
    if source in KERNELS:
        assert report.kernels > 0
        assert report.kernels % count == 0
    assert (report.spill_bytes, report.stack_bytes) == (0, 0)
    assert report.serialized == 0, "ptxas put a wait behind every wgmma"


class Compiled(NamedTuple):
    source: Path
    report: NvccReport
    code: str


@pytest.fixture(scope="module", params=HOPPER, ids=name_of)
def hopper(request: pytest.FixtureRequest) -> Compiled:
    """pytest runs the tests of one file after each other, so that it is disassembled once."""
    report = nvcc_report(request.param, "90a")
    return Compiled(request.param, report, machine_code(report))


@needs_disassembler
def test_hopper_kernels_use_wgmma_and_asynchronous_copies(hopper: Compiled) -> None:
    is_fp8 = "fp8" in hopper.source.name
    product = r"\bQGMMA\.64x\d+x32\.F32\.E4M3\.E4M3\b" if is_fp8 else r"\bHGMMA\.64x\d+x16\.F32\.BF16\b"
    assert re.search(product, hopper.code)
    assert re.search(r"\bUTMALDG\b|\bUBLKCP\b|\bLDGSTS\b", hopper.code)


@needs_disassembler
def test_roles_divide_the_registers_that_the_block_owns(hopper: Compiled) -> None:
    """What ptxas gives a thread at entry, not the multiprocessor's 65,536: setmaxnreg waits forever for the rest."""
    more, less = (
        {int(count, 16) for count in re.findall(rf"USETMAXREG\.{what}\.CTAPOOL (?:UP\d+, )?0x([0-9a-f]+)", hopper.code)}
        for what in ("TRY_ALLOC", "DEALLOC")
    )
    assert len(more) == len(less) == 1
    assert hopper.report.registers == 65536 // 384 // 8 * 8
    assert 256 * more.pop() + 128 * less.pop() <= 384 * hopper.report.registers


@needs_disassembler
def test_conformance_tries_the_multiplication_that_decoding_uses() -> None:
    """A known addend of -0 makes HMUL2 of fma; whether subnormal numbers count is asked of that instruction."""
    for source in (SIM / "conformance" / "warp.cu", CSRC / "grouped_gemm/sm90/quantized_gate_up.cu"):
        assert re.search(r"\bHMUL2\.BF16", machine_code(nvcc_report(source, "90a"))), source


@needs_disassembler
@pytest.mark.parametrize(
    "name",
    [f"grouped_gemm/cuda/{name}" for name in ("combine", "sum_segments", "sum_int8_segments", "quantize_rows_int8")]
    + ["grouped_gemm/sm80/int8_down", "denoise/cuda/merge_shards"]
    + ["block_attention/cuda/append_to_pages", "block_attention/cuda/combine_splits"],
)
def test_what_the_kernel_in_front_wrote_is_not_read_as_constant(name: str) -> None:
    """ld.global.nc is for memory that nobody writes; the wait for that kernel does not order it."""
    code = machine_code(nvcc_report(CSRC / f"{name}.cu", PORTABLE))
    assert re.search(r"\bLDG\.E\b", code)
    assert not re.search(r"\bLDG\b.*\.CONSTANT\b", code)


def test_registers_are_divided_by_a_plan() -> None:
    """RegisterPlan, which refuses a division that waits forever."""
    callers = [
        path
        for pattern in ("*.cu", "*.h")
        for path in CSRC.rglob(pattern)
        if re.search(r"\b(in|de)crease_registers<", path.read_text())
    ]
    assert [path.relative_to(CSRC).as_posix() for path in callers] == ["device/registers.h"]


@needs_disassembler
@pytest.mark.parametrize("source", TENSOR_CORE_80, ids=name_of)
def test_sm80_kernels_use_tensor_cores_and_asynchronous_copies(source: Path) -> None:
    per_architecture = re.split(r"^\s*Fatbin elf code", machine_code(nvcc_report(source, PORTABLE)), flags=re.MULTILINE)
    listings = [text for text in per_architecture if "Function :" in text]
    assert len(listings) == PORTABLE_ARCHITECTURES
    for listing in listings:
        is_int8 = source.name.startswith("int8")
        assert re.search(r"\bIMMA\.16832\.S8\.S8\b" if is_int8 else r"\bHMMA\.16816\.F32\.BF16\b", listing)
        assert bool(re.search(r"\bHMMA\b", listing)) != is_int8
        assert re.search(r"\bLDGSTS\b", listing)
        # The operands of quantized weights lie in shared memory as the tensor core's lanes take them: whole words, LDS.
        in_words = is_int8 or "quantized" in source.name
        assert re.search(r"\bLDS(\.64|\.128)\b" if in_words else r"\bLDSM\b", listing)


@needs_disassembler
@pytest.mark.parametrize("source", FP8_BY_MMA, ids=name_of)
def test_fp8_is_multiplied_as_it_is(source: Path) -> None:
    """On 9.0 nvcc makes conversions and float16 products of the same instruction."""
    per_architecture = re.split(r"^\s*Fatbin elf code", machine_code(nvcc_report(source, FP8_MMA)), flags=re.MULTILINE)
    listings = [text for text in per_architecture if "Function :" in text]
    assert len(listings) == FP8_MMA_ARCHITECTURES
    for listing in listings:
        assert re.search(r"\bQMMA\.16832\.F32\.E4M3\.E4M3\b", listing)
        assert not re.search(r"\bHMMA\b", listing)
        assert re.search(r"\bLDGSTS\b", listing)
        assert re.search(r"\bLDS\.128\b", listing)


@pytest.mark.parametrize(("architecture", "waits"), [(80, False), (90, True)])
def test_code_for_8_0_does_not_wait_for_the_kernel_in_front(architecture: int, waits: bool, tmp_path: Path) -> None:
    """Not on a newer GPU either, whose driver compiles this PTX where a build has no newer one."""
    nvcc, ptx = find_nvcc(), tmp_path / "combine.ptx"
    assert nvcc is not None
    command = [nvcc, "-std=c++20", "-ptx", f"-arch=compute_{architecture}", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    subprocess.run([*command, str(CSRC / "grouped_gemm/cuda/combine.cu"), "-o", str(ptx)], check=True)
    assert ("griddepcontrol.wait" in ptx.read_text()) == waits


def launches_over_a_stand_in(source: str, program: Path) -> Callable[..., str]:
    """Compiles launches over a CUDA runtime of its own; what a run with this argument says of the runtime's calls."""
    nvcc = find_nvcc()
    assert nvcc is not None
    sources = [str(SIM / "runtime" / name) for name in (source, "overlap_runtime.cpp")]
    subprocess.run(
        [nvcc, "-std=c++20", "-arch=sm_90", "-cudart", "none", f"-I{CSRC}", *sources, "-o", str(program)], check=True
    )

    def launches(argument: int, **environment: str) -> str:
        settings = {**os.environ, **environment}
        command = [str(program), str(argument)]
        return subprocess.run(command, env=settings, check=True, capture_output=True, text=True).stdout.strip()

    return launches


def test_only_code_that_waits_is_launched_with_overlap(tmp_path: Path) -> None:
    """Launches that ask for it, do not, and ask again, on a GPU of 12.0, by the PTX version of the code; then how often
    the runtime was asked."""
    launches = launches_over_a_stand_in("overlap_gate.cu", tmp_path / "overlap_gate")
    assert launches(80) == "0 0 0 1"
    assert launches(90) == "1 0 1 1"
    assert launches(90, DGEMMA_PDL="0") == "0 0 0 0"


def test_a_launch_may_ask_whether_its_blocks_fit(tmp_path: Path) -> None:
    """Launches that count on 1, 2 and 3 blocks of a multiprocessor, by how many fit; then the runtime's questions and
    carveouts."""
    launches = launches_over_a_stand_in("residency.cu", tmp_path / "residency")
    refused = "[fewer blocks fit a multiprocessor than the launch counts on]"
    assert launches(2) == "0 0 0 0 2"
    assert launches(3, DGEMMA_RESIDENCY="1") == "0 0 0 3 2"
    assert launches(2, DGEMMA_RESIDENCY="1") == f"0 0 {refused} 3 2"
