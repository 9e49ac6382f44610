"""Builds what a run on a GPU needs into one folder: the package, tools/probe.cu and the conformance table.

    python tools/gpu_build.py FOLDER                          for the GPU of this machine
    python tools/gpu_build.py FOLDER --architecture 90a       for another one; this machine needs none
    python tools/gpu_build.py FOLDER --carried build/carry    takes what was built there, if it fits, else builds

FOLDER/site holds the package, FOLDER/probe and FOLDER/conformance the programs, FOLDER/cmake the objects. A build fits
when it is of the same C++ and CUDA sources and its module loads in this Python; Python files come from this tree.

It needs nothing from the network: the Python that runs it must hold torch and what builds the package
(scikit-build-core, cmake, ninja); nvcc 13 must be on the PATH, under CUDA_HOME or in /usr/local/cuda.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from build import cuda_defines
from cuda_tools import architectures_of_gpus, find_nvcc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "dgemma_ext"
DIGEST = "sources.sha256"
LOADS = "from dgemma_ext import _C; assert _C.has_cuda(), 'built without CUDA'"


def package_command(nvcc: str, architecture: str, folder: Path) -> list[str]:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    pip += ["--disable-pip-version-check", "--upgrade", "--target", str(folder / "site")]
    return [*pip, f"-Cbuild-dir={folder / 'cmake'}", *cuda_defines(nvcc, [architecture]), str(ROOT)]


def probe_command(nvcc: str, architecture: str, program: Path) -> list[str]:
    return [*_compiler(nvcc, architecture), "-o", str(program), str(ROOT / "tools" / "probe.cu")]


def conformance_command(nvcc: str, architecture: str, program: Path) -> list[str]:
    """The table holds wgmma, so it is compiled for 90a alone."""
    sources = sorted((ROOT / "tests" / "sim" / "conformance").glob("*.cu"))
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    return [*_compiler(nvcc, architecture), *include, "--threads", "0", "-o", str(program), *map(str, sources)]


def _compiler(nvcc: str, architecture: str) -> list[str]:
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    return [nvcc, "-std=c++20", "-O3", "-lineinfo", "-gencode", code]


def build(nvcc: str, architecture: str, folder: Path, programs: bool = True) -> list[str]:
    """Builds all at once; what failed. programs: not the package alone."""
    folder.mkdir(parents=True, exist_ok=True)
    # Nothing of an earlier build may stand in where this one fails.
    (folder / DIGEST).unlink(missing_ok=True)
    shutil.rmtree(folder / "site" / "dgemma_ext", ignore_errors=True)
    commands = {"package": package_command(nvcc, architecture, folder)}
    if programs:
        commands["probe"] = probe_command(nvcc, architecture, folder / "probe")
        if architecture == "90a":
            commands["conformance"] = conformance_command(nvcc, architecture, folder / "conformance")
    began = time.monotonic()
    running = {name: subprocess.Popen(command, cwd=ROOT) for name, command in commands.items()}
    failed = [name for name, process in running.items() if process.wait() != 0]
    print(f"built {', '.join(running)} for {architecture} in {time.monotonic() - began:.0f} s", flush=True)
    if not failed:
        (folder / DIGEST).write_text(digest_of_sources() + "\n")
    return failed


def digest_of_sources() -> str:
    """Of everything that is compiled."""
    folders = [ROOT / "csrc", ROOT / "cmake", ROOT / "tests" / "sim" / "conformance"]
    files = [ROOT / "CMakeLists.txt", ROOT / "tools" / "probe.cu"]
    files += [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def take(carried: Path, folder: Path) -> str | None:
    """Copies a build and this tree's Python files. What speaks against it, or None."""
    if not carried.is_dir():
        return f"{carried} is not there"
    digest = carried / DIGEST
    if not digest.exists() or digest.read_text().strip() != digest_of_sources():
        return f"{carried} is of other sources"
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(PACKAGE, site / "dgemma_ext", ignore=shutil.ignore_patterns("_C.*.so", "__pycache__"))
    for module in (carried / "site" / "dgemma_ext").glob("_C.*.so"):
        shutil.copy(module, site / "dgemma_ext")
    loads = [sys.executable, "-c", LOADS]
    done = subprocess.run(loads, capture_output=True, text=True, check=False, env=environment(folder))
    if done.returncode != 0:
        return f"the module in {carried} does not load: {(done.stderr.strip().splitlines() or ['no words'])[-1]}"
    for name in ("probe", "conformance"):
        if (carried / name).exists():
            shutil.copy(carried / name, folder / name)
            (folder / name).chmod(0o755)
    return None


def environment(folder: Path) -> dict[str, str]:
    """With the package of a folder first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "site"), os.getenv("PYTHONPATH")]))}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", metavar="90a", help="compute capability (default: this machine's GPU)")
    parser.add_argument("--carried", type=Path, metavar="FOLDER", help="a build to take if it fits")
    chosen = parser.parse_args(arguments)
    folder: Path = chosen.folder.resolve()
    if chosen.carried is not None:
        problem = take(chosen.carried.resolve(), folder)
        if problem is None:
            print(f"took the build in {chosen.carried}")
            return 0
        print(f"{problem}: building", flush=True)
    nvcc = find_nvcc()
    found = [chosen.architecture] if chosen.architecture else architectures_of_gpus()
    if nvcc is None or not found:
        missing = "nvcc 13 was not found" if nvcc is None else "no GPU was found; --architecture says what to build for"
        print(f"tools/gpu_build.py: {missing}", file=sys.stderr)
        return 2
    failed = build(nvcc, found[0], folder)
    if failed:
        print(f"tools/gpu_build.py: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
