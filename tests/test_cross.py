"""The C library for 64-bit ARM: cross-compiled, and its tests run under an emulator (`make cross`).

cross.py says how the tests reach it. The scalar variant is the only one there, and promises the bits that it has on
every machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cross
from c_interface import ABI, INCLUDE, ROOT, abi_listing, build_folder, cache_of, run
from dgemma_ext import demo

pytestmark = pytest.mark.skipif(cross.MISSING != [], reason=f"not here: {', '.join(cross.MISSING)}")

EXAMPLE = ROOT / "examples" / "embed_c"


def test_the_build_is_for_the_other_machine_and_has_no_flag_of_this_one() -> None:
    library = cross.build() / "libdgemma.so"
    assert "AArch64" in run("readelf", "-h", library)
    commands = (cross.build() / "compile_commands.json").read_text()
    assert re.findall(r" -m\S+", commands) == []
    assert cache_of(cross.build())["CMAKE_HOME_DIRECTORY"] == str(ROOT)


def test_the_layout_of_structs_is_the_listed_one(tmp_path: Path) -> None:
    listed = abi_listing(tmp_path, cross.COMPILER, cross.emulated(tmp_path / "abi"))
    assert listed.splitlines() == ABI.read_text().splitlines()


@pytest.mark.parametrize(("file", "least"), [("test_c_operators.py", 80), ("test_c_refusals.py", 60)])
def test_the_tests_of_the_c_interface(file: str, least: int) -> None:
    """They run with the library there in the place of the one here, and with torch's operators here on the scalar
    variant, whose bits are the same."""
    cross.build()
    settings = {**os.environ, "DGEMMA_TEST_MACHINE": cross.TARGET, "DGEMMA_CPU": "scalar"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:randomly", f"tests/{file}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=settings)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= least


def compile_example(folder: Path, compiler: str, library: Path) -> Path:
    """The example on the scalar variant, which is the best one on the other machine."""
    best = "static dgemma_cpu serial = DGEMMA_CPU_SERIAL;"
    sources = []
    for source in sorted(EXAMPLE.glob("*.c")):
        if source.name == "device_cuda.c":
            continue
        text = source.read_text()
        if source.name == "device_cpu.c":
            assert best in text
            text = text.replace(best, "static dgemma_cpu serial = {NULL, NULL, DGEMMA_CPU_SCALAR, {0}};")
        (folder / source.name).write_text(text)
        sources.append(folder / source.name)
    include = [f"-I{INCLUDE.parent}", f"-I{EXAMPLE}"]
    program = folder / "embed_c"
    run(compiler, "-std=c11", "-O2", "-ffp-contract=off", *include, *sources, "-o", program, f"-L{library}", "-ldgemma",
        "-lm", f"-Wl,-rpath,{library}")  # fmt: skip
    return program


@pytest.mark.parametrize("size", [6, 9])
def test_the_example_gives_the_tokens_of_this_machine(size: int, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    emulated = cross.emulated(compile_example(there, cross.COMPILER, cross.build()))
    native = compile_example(here, "cc", build_folder())
    arguments = [demo.checkpoint(size), demo.draw(size, 1).text, "--seed", "1"]
    _, *wanted = run(native, *arguments).splitlines()  # the first line names the device
    _, *got = run(*emulated, *arguments).splitlines()
    assert got == wanted
