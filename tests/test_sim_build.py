"""Device wrappers and host forms have the same names; kernel files keep the rules; nvcc compiles without spills."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
        assert functions_of(HOST / name) - {"flushed"} == wanted, name


def test_every_wrapper_has_a_row_and_every_test_of_it_exists() -> None:
    lines = [line for line in (SIM / "README.md").read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert all(len(row) == 4 for row in rows)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    wrappers = set[str]().union(*(functions_of(path) for path in DEVICE.glob("*.h"))) - {"alignas"}
    assert sorted(named) == sorted(wrappers)
    tests = "".join((SIM.parent / f"test_sim_{name}.py").read_text() for name in ("faults", "conformance"))
    for row in rows:
        found = re.findall(r"`([^`]+)`", row[3])
        assert found, row
        for test in found:
            exists = (ROOT / test).exists() if "/" in test else f'"{test}"' in tests or f"def {test}(" in tests
            assert exists, (row[0], test)


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
