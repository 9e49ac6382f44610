"""Device wrappers and host forms have the same names; kernel files keep the rules; nvcc compiles without spills."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import test_sim_conformance
import test_sim_faults
from sim.build import ROOT, SIM, find_nvcc, nvcc_report

DEVICE = ROOT / "csrc" / "device"
HOST = SIM / "device"
# Plain C++, the same file on both sides.
SHARED = {"philox.h", "registers.h", "swizzle.h", "tensor_layout.h", "matrix_descriptor.h"}
# The parts of wgmma.h, and the header that only a device compiler needs.
DEVICE_ONLY_FILES = {"wgmma_shapes.h"}
DEVICE_ONLY_NAMES = {"wgmma.h": {"hold_registers"}, "launch.h": {"can_overlap", "reserve_for_blocks"}}

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
FAMILIES = {"grouped_gemm", "block_attention", "denoise", "layer"}
KERNEL_FILES = sorted([*(SIM / "kernels").glob("sm*.cu"), *(ROOT / "csrc").rglob("*.cu")])


# Faults of CUDA C++ itself, which no wrapper stands for: collectives, atomics, ordinary loads and stores, the stack,
# arithmetic.
OF_THE_LANGUAGE = {
    "atomic_beside_ordinary",
    "barriers_of_two_numbers",
    "copy_over_what_others_copied",
    "divide_by_zero",
    "fill_the_stack",
    "index_past_an_array",
    "lane_outside_its_mask",
    "lanes_part",
    "misaligned_load",
    "misaligned_store",
    "offset_in_32_bits",
    "part_at_syncthreads",
    "read_what_another_block_writes",
    "same_shuffle_in_two_places",
    "shift_too_far",
    "shuffle_from_outside_the_mask",
    "shuffle_with_ended_lane",
    "store_past_the_end",
    "syncthreads_in_two_places",
    "write_the_same_word",
    "write_what_others_read",
    "write_within_a_warp",
    "write_without_barrier",
}


def functions_of(header: Path) -> set[str]:
    """The names of the functions that a header of wrappers defines or declares at namespace level."""
    text = re.sub(r"//.*", "", header.read_text())
    found = re.findall(r"^(?:[\w:*&<>]+ )+[*&]*(\w+)\(", text, re.MULTILINE)
    return {name for name in found if name not in {"asm", "if", "for", "while", "switch", "return"}}


def test_every_wrapper_has_a_host_form_of_the_same_name() -> None:
    device = {path.name for path in DEVICE.glob("*.h")} - SHARED - DEVICE_ONLY_FILES
    assert {path.name for path in HOST.glob("*.h")} == device
    for name in sorted(device - {"language.h"}):
        wanted = functions_of(DEVICE / name) - DEVICE_ONLY_NAMES.get(name, set())
        assert wanted, name
        assert functions_of(HOST / name) - {"flushed", "launch_bound"} == wanted, name


def rows_of_wrappers() -> list[list[str]]:
    """The table of tests/sim/README.md: wrappers, what must hold, how it is enforced, tests."""
    lines = [line for line in (SIM / "README.md").read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_wrapper_has_a_row() -> None:
    rows = rows_of_wrappers()
    assert all(len(row) == 4 for row in rows)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    wrappers = set[str]().union(*(functions_of(path) for path in DEVICE.glob("*.h"))) - {"alignas"}
    assert sorted(named) == sorted(wrappers)


@pytest.mark.parametrize("row", rows_of_wrappers(), ids=lambda row: re.findall(r"\w+", row[0])[0])
def test_a_row_names_tests_that_exist_and_a_fault(row: list[str]) -> None:
    """Where a contract holds more than values, what breaks it is planted and reported."""
    tests = re.findall(r"`([^`]+)`", row[3])
    refusals = {name for name in dir(test_sim_faults) if name.startswith("test_")} - {"test_fault_is_reported"}
    faults = set(test_sim_faults.REPORTS) | refusals
    for test in tests:
        assert test in faults or test in test_sim_conformance.CASES or ("/" in test and (ROOT / test).is_file()), test
    assert tests
    assert row[1].startswith("none") or faults & set(tests), "no fault is planted"


def test_every_fault_is_in_the_table_or_of_the_language() -> None:
    """What the table does not name is a fault of what has no wrapper: the language's own, and plain memory."""
    named = {test for row in rows_of_wrappers() for test in re.findall(r"`([^`]+)`", row[3])}
    assert set(test_sim_faults.REPORTS) - named == OF_THE_LANGUAGE


def test_only_device_headers_hold_assembly() -> None:
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"} and path.parent != DEVICE:
            assert not re.search(r"\basm\b", path.read_text()), path


def test_the_kernel_files_are_found() -> None:
    """With an empty list every test below would pass."""
    folders = {str(path.parent.relative_to(ROOT / "csrc")) for path in KERNEL_FILES if SIM not in path.parents}
    assert {f"{family}/cuda" for family in FAMILIES} | {"cuda", "grouped_gemm/sm90", "denoise/sm80"} <= folders
    assert any(SIM in path.parents for path in KERNEL_FILES)


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: str(path.relative_to(ROOT).with_suffix("")))
def test_kernel_file_keeps_the_rules(path: Path) -> None:
    text = re.sub(r"//.*", "", path.read_text())
    assert "<<<" not in text, "launch() starts kernels"
    assert not re.search(r"\basm\b", text), "PTX lives in csrc/device"
    assert "__shared__" not in text, "one struct in dynamic shared memory"
    assert not re.search(r"#include [<\"](torch|ATen|c10|cuda[_.])", text), "kernels include device/*.h alone"


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        ("kernels/sm90_bf16_tile_product.cu", "90a"),
        ("kernels/sm80_bf16_tile_product.cu", "80"),
        ("kernels/sm80_bf16_tile_product.cu", "120"),
        ("conformance/copy.cu", "90a"),
        ("conformance/tensor_copy.cu", "90a"),
        ("conformance/warp.cu", "90a"),
    ],
)
def test_nvcc_compiles_without_warnings_or_spills(source: str, architecture: str) -> None:
    report = nvcc_report(SIM / source, architecture)
    assert report.kernels > 0
    assert (report.spill_bytes, report.stack_bytes) == (0, 0)


@needs_nvcc
def test_nvcc_compiles_every_wgmma_shape() -> None:
    report = nvcc_report(SIM / "conformance" / "wgmma.cu", "90a")
    assert report.kernels >= 64
    assert (report.spill_bytes, report.stack_bytes) == (0, 0)
