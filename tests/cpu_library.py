"""Builds some of the library's CPU sources as a shared library, for what no Python binding reaches; cached."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "cpu"
X86 = platform.machine() in ("x86_64", "AMD64")
# As in cmake/Library.cmake.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}
COMMON = ["g++", "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMMON += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", '-DDGEMMA_VERSION="0"']


def cpu_library(name: str, sources: Sequence[Path]) -> ctypes.CDLL:
    """A file named after an instruction set is compiled for it, and left out where no compiler has it."""
    digest = hashlib.sha256(repr(COMMON).encode())
    headers = sorted((ROOT / "csrc").rglob("*.h"))
    for path in [*sources, *headers]:
        digest.update(str(path).encode() + path.read_bytes())
    target = CACHE / f"{name}-{digest.hexdigest()[:20]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            objects = []
            for source in sources:
                variant = re.search(r"_(scalar|avx2|avx512|avx512_bf16)\.cpp$", source.name)
                if variant and variant[1] != "scalar" and not X86:
                    continue
                out = target.with_name(f"{target.stem}-{source.stem}.o")
                flags = FLAGS[variant[1]] if variant else []
                subprocess.run([*COMMON, *flags, "-c", str(source), "-o", str(out)], check=True)
                objects.append(out)
            partial = target.with_suffix(".partial")
            subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(partial)], check=True)
            partial.rename(target)
    return ctypes.CDLL(str(target))
