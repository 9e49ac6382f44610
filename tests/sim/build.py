"""Builds kernels for the host with g++, cached by content under build/sim, and checks them with nvcc.

library = sim_library("grouped_gemm", [ROOT / "csrc/grouped_gemm/sm90/bf16_down.cu"])     # a ctypes.CDLL
binary = sim_program("conformance", sources, sanitize=True)                             # ASan and UBSan
report = nvcc_report(ROOT / "csrc/grouped_gemm/sm90/bf16_down.cu", "90a")                 # needs nvcc
report = nvcc_report(ROOT / "csrc/grouped_gemm/cuda/combine.cu", PORTABLE)                   # for all architectures
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cuda_tools import find_nvcc, find_tool
from sim import cmake_build

SIM = Path(__file__).resolve().parent
ROOT = cmake_build.ROOT
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "sim"
TEST_BED = SIM / "all.cpp"

# The switch of fibers is x86-64 assembly, and its authors had no other machine.
SUPPORTED = platform.machine() in ("x86_64", "AMD64") and shutil.which("g++") is not None

INCLUDE = [f"-I{SIM}", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
# -Wrestrict: GCC 12 sees an overlap in std::string's operator+ that is not there (bug 105651). -Wpsabi only tells that
# vectors are passed otherwise than by GCC 4.
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-restrict", "-Wno-psabi"]
KERNELS = ["-DDGEMMA_WITH_SM89", "-DDGEMMA_WITH_SM90", "-DDGEMMA_WITH_SM120"]
COMMON = ["-std=c++20", "-DDGEMMA_SIM", *KERNELS, "-fPIC", "-fvisibility=hidden", "-g1", *WARNINGS, *INCLUDE]
# A call in front of every load and store of a kernel, for which tests/sim/plain_access.cpp is there, and one where
# something undefined happens, for tests/sim/undefined.cpp: as in cmake/Sim.cmake.
WATCHED = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
WATCHED += ["-fsanitize=alignment,bounds,integer-divide-by-zero,shift,signed-integer-overflow"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"]


@cache
def _machine_flags() -> list[str]:
    """-mavx2 where this machine has it (products run several times faster); -Werror with the g++ it was tried with."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    vectors = ["-mavx2", "-mfma"] if " avx2 " in flags and " fma " in flags else []
    version = _run(["g++", "-dumpversion"]).strip()
    return vectors + (["-Werror"] if int(version.split(".")[0]) < 13 else [])


def _headers(source: Path) -> list[Path]:
    """Everything that a source may include: too many files only rebuild too often."""
    folders = {SIM, CSRC / "device"} if source == TEST_BED else {SIM, CSRC, source.parent}
    found = {path for folder in folders for path in folder.rglob("*.h")}
    if source == TEST_BED:
        found |= set(SIM.glob("*.cpp"))
    return sorted(found)


@cache
def _header_digest(source: Path) -> bytes:
    digest = hashlib.sha256()
    for header in _headers(source):
        digest.update(str(header).encode() + header.read_bytes())
    return digest.digest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One builder at a time, also among several runs of the suite."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    said = result.stdout + result.stderr
    assert result.returncode == 0, f"{' '.join(command)}\n{said[:4000]}"
    return said


def _object(source: Path, flags: Sequence[str]) -> Path:
    command = ["g++", *COMMON, *flags, *_machine_flags()]
    digest = hashlib.sha256(repr((str(source), command)).encode() + source.read_bytes() + _header_digest(source))
    target = CACHE / f"{source.stem}-{digest.hexdigest()[:20]}.o"
    with _lock(target):
        if not target.exists():
            partial = target.with_suffix(".partial")
            _run([*command, "-x", "c++", "-c", str(source), "-o", str(partial)])
            partial.rename(target)
    return target


def _linked(name: str, objects: Sequence[Path], flags: Sequence[str], suffix: str) -> Path:
    # CMake's objects keep their names when they change.
    made = [(str(path), path.stat().st_mtime_ns) for path in objects]
    digest = hashlib.sha256(repr((name, made, list(flags))).encode()).hexdigest()[:20]
    target = CACHE / f"{name}-{digest}{suffix}"
    with _lock(target):
        if not target.exists():
            partial = target.with_suffix(".partial")
            _run(["g++", *flags, *(str(path) for path in objects), "-o", str(partial)])
            partial.rename(target)
    return target


def _objects(sources: Sequence[Path], flags: Sequence[str] = ()) -> list[Path]:
    """The test bed and these: from CMake's build what it has."""
    shared = [source for source in sources if source.is_relative_to(CSRC)]
    own = [source for source in sources if source not in shared]
    watched = {source: WATCHED if source.suffix == ".cu" else [] for source in own}
    return [
        *cmake_build.objects([TEST_BED, *shared]),
        *(_object(source, ["-O2", *watched[source], *flags]) for source in own),
    ]


def sim_library(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The kernels and the test bed as one shared library; every function of it gives its message as bytes or None.

    Ordinary loads and stores of the kernels are looked at. `flags` are for what is not in csrc.
    """
    library = ctypes.CDLL(str(_linked(name, _objects(sources, flags), ["-shared"], ".so")))
    library.sim_watch_plain_accesses(1)
    return library


def sim_program(name: str, sources: Sequence[Path], sanitize: bool = False) -> Path:
    """The same as a program, which does not look at ordinary loads and stores; one of the sources has `main`."""
    if not sanitize:
        return _linked(name, _objects(sources), [], "")
    return _linked(name, [_object(source, SANITIZE) for source in (TEST_BED, *sources)], SANITIZE[:1], "")


# What a kernel for every architecture is compiled to, as in cmake/Cuda.cmake.
PORTABLE = "portable"
_PORTABLE_CODE = ["arch=compute_80,code=[sm_80,sm_86,sm_89]", "arch=compute_90,code=[sm_90,sm_100,sm_120,compute_90]"]
PORTABLE_ARCHITECTURES = 6
# And one that multiplies FP8 by mma.sync.
FP8_MMA = "fp8 by mma"
FP8_MMA_ARCHITECTURES = 2
_CODE = {PORTABLE: _PORTABLE_CODE, FP8_MMA: ["arch=compute_89,code=sm_89", "arch=compute_90,code=[sm_120,compute_90]"]}


@dataclass
class NvccReport:
    kernels: int  # compiled, one for each architecture
    spill_bytes: int
    stack_bytes: int
    serialized: int  # kernels whose wgmmas ptxas makes wait for each other (its notes C7510 to C7519)
    registers: int  # of the kernel that uses most
    object: Path  # or the file with the GPUs' code alone


def nvcc_report(source: Path, architecture: str) -> NvccReport:
    """Compiles for one architecture, PORTABLE or FP8_MMA, warnings being errors, and reads what ptxas says."""
    codes = _CODE.get(architecture, [f"arch=compute_{architecture},code=sm_{architecture}"])
    options = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-DDGEMMA_WITH_SM90"]
    options += ["-DDGEMMA_WITH_SM89", "-DDGEMMA_WITH_SM120"]
    options += [word for code in codes for word in ("-gencode", code)]
    options += ["-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage", *INCLUDE[1:]]
    nvcc = find_nvcc()
    assert nvcc is not None, "nvcc was not found"
    # The build that the suite runs on has shown the host's code of most kernels to its compiler, warnings being errors.
    device_alone = source.is_relative_to(CSRC) and source.parent.name != "sm89" and "__global__" in source.read_text()
    command = [nvcc, *options, "-fatbin" if device_alone else "-c", str(source)]
    digest = hashlib.sha256(repr((command, str(source))).encode() + source.read_bytes() + _header_digest(source))
    target = CACHE / f"{source.stem}-{architecture.replace(' ', '-')}-{digest.hexdigest()[:20]}.ptxas"
    with _lock(target):
        if not target.exists():
            partial = target.with_suffix(".partial")
            partial.write_text(_run([*command, "-o", str(target.with_suffix(".o"))]))
            partial.rename(target)
    text = target.read_text()

    def numbers(pattern: str) -> list[int]:
        return [int(found) for found in re.findall(pattern, text)]

    return NvccReport(
        kernels=len(re.findall(r"Compiling entry function", text)),
        spill_bytes=sum(numbers(r"(\d+) bytes spill")),
        stack_bytes=sum(numbers(r"(\d+) bytes stack frame")),
        serialized=len(re.findall(r"wgmma.mma_async instructions are serialized", text)),
        registers=max(numbers(r"Used (\d+) registers"), default=0),
        object=target.with_suffix(".o"),
    )


def machine_code(report: NvccReport) -> str:
    """What cuobjdump shows of a compiled file; needs cuobjdump and nvdisasm."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    assert cuobjdump is not None, "cuobjdump was not found"
    assert nvdisasm is not None, "nvdisasm was not found"
    path = {**os.environ, "PATH": os.pathsep.join([str(Path(nvdisasm).parent), os.environ["PATH"]])}
    command = [cuobjdump, "-sass", str(report.object)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=path).stdout
