"""The C interface as ctypes sees it: the shared library of the build at hand, and its structs read from the headers.

library = load()                                   # a ctypes.CDLL of libdgemma.so
call(library, "cpu_rms_norm", tokens=3, hidden_size=8, epsilon=1e-6, dtype=BFLOAT16, input=x, weight=None, output=y)
python tests/c_interface.py > csrc/abi.txt         # after something was added to the headers
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "csrc" / "include" / "dgemma"
OK, INVALID_ARGUMENT, UNSUPPORTED, WORKSPACE_TOO_SMALL, CUDA_ERROR = range(5)
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
VARIANTS = ["scalar", "avx2", "avx512", "avx512_bf16"]
BEST = -1


def environment() -> dict[str, str]:
    """The environment with this Python's cmake and ninja first."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def run(*command: str | Path, **options: Any) -> str:
    """Runs a command that must succeed, and returns its output."""
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, env=environment(), **options
    )
    assert done.returncode == 0, f"{command}\n{(done.stdout + done.stderr)[-6000:]}"
    return done.stdout


def cache_of(folder: Path) -> dict[str, str]:
    """The settings of a CMake build folder."""
    lines = (folder / "CMakeCache.txt").read_text().splitlines()
    return {m[1]: m[2] for line in lines if (m := re.match(r"([A-Za-z_]+):[A-Z]+=(.*)", line))}


@cache
def build_folder() -> Path:
    """The newest build of this tree, the Python package's where there is one, with both libraries up to date.

    Without any it makes one of the library alone, which takes a minute.
    """
    # `make gpu-check` builds in build/gpu.
    builds = [
        path.parent for pattern in ("*", "gpu/cmake") for path in (ROOT / "build").glob(f"{pattern}/CMakeCache.txt")
    ]
    builds.sort(key=lambda folder: (folder / "CMakeCache.txt").stat().st_mtime)
    usable = [
        folder
        for folder in builds
        if (found := cache_of(folder)).get("CMAKE_HOME_DIRECTORY") == str(ROOT)
        and found.get("DGEMMA_SIM") == "OFF"
        and "CMAKE_TOOLCHAIN_FILE" not in found  # of another machine
    ]
    folder = usable[-1] if usable else ROOT / "build" / "c"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "c_interface.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not usable:
            run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja")
        run("cmake", "--build", folder, "--target", "dgemma", "dgemma_shared")
    return folder


@cache
def load() -> ctypes.CDLL:
    """The library of the build at hand; that of another machine where DGEMMA_TEST_MACHINE asks for it (cross.py)."""
    if "DGEMMA_TEST_MACHINE" in os.environ:
        from cross import Remote

        return cast(ctypes.CDLL, Remote())
    return ctypes.CDLL(str(build_folder() / "libdgemma.so"))


# Headers -------------------------------------------------------------------------------------------------------------


@cache
def header_text() -> str:
    """All headers without comments, base.h and denoise.h before those that include them."""
    files = sorted(INCLUDE.glob("*.h"), key=lambda path: (path.name not in ("base.h", "denoise.h"), path.name))
    return re.sub(r"/\*.*?\*/", "", "\n".join(path.read_text() for path in files), flags=re.DOTALL)


def declared_functions() -> list[str]:
    return sorted(set(re.findall(r"DGEMMA_API[^;(]*?(dgemma_\w+)\(", header_text())))


_SCALARS = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "uint8_t": ctypes.c_uint8,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "size_t": ctypes.c_size_t,
}


def enumerators() -> list[str]:
    bodies = re.findall(r"typedef enum dgemma_\w+ \{(.*?)\}", header_text(), re.DOTALL)
    return [name for body in bodies for name in re.findall(r"\b(DGEMMA_\w+)\b", body)]


# The ABI as a compiler sees the headers; its list in the repository is csrc/abi.txt.
ABI = ROOT / "csrc" / "abi.txt"


def abi_listing(folder: Path, compiler: str = "cc", command: list[str] | None = None) -> str:
    """One line for every function, struct (its size and where its fields are) and enumerator, by a C program.

    `command` runs <folder>/abi where the compiler's machine is another.
    """
    lines = [f'  puts("function {name}");' for name in declared_functions()]
    for name, struct in sorted(structs().items()):
        lines.append(f'  printf("struct dgemma_{name} %zu", sizeof(dgemma_{name}));')
        for field, *_ in struct._fields_:
            lines.append(f'  printf(" {field}:%zu", offsetof(dgemma_{name}, {field}));')
        lines.append('  puts("");')
    lines += [f'  printf("enum {name} %d\\n", {name});' for name in enumerators()]
    includes = [f"#include <dgemma/{path.name}>" for path in sorted(INCLUDE.glob("*.h"))]
    program = "\n".join(["#include <stdio.h>", *includes, "int main(void) {", *lines, "  return 0;", "}", ""])
    (folder / "abi.c").write_text(program)
    strict = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    run(compiler, *strict, f"-I{INCLUDE.parent}", folder / "abi.c", "-o", folder / "abi")
    return run(*(command or [folder / "abi"]))


@cache
def structs() -> dict[str, type[ctypes.Structure]]:
    """The struct of every operation by its name without dgemma_, and cpu and cuda, which say where a call runs."""
    found: dict[str, type[ctypes.Structure]] = {}
    types: dict[str, Any] = dict(_SCALARS)
    types |= {name: ctypes.c_int for name in re.findall(r"typedef enum (dgemma_\w+)", header_text())}
    for name, body in re.findall(r"typedef struct (dgemma_\w+) \{(.*?)\} \1;", header_text(), re.DOTALL):
        fields: list[tuple[str, Any]] = []
        for statement in filter(None, (" ".join(s.split()) for s in body.split(";"))):
            if match := re.match(r"void \(\*(\w+)\)", statement):
                fields.append((match[1], ctypes.c_void_p))
            elif match := re.match(r"char (\w+)\[(\d+)\]", statement):
                fields.append((match[1], ctypes.c_char * int(match[2])))
            elif match := re.match(r"(?:const )?\w+\s*\* ?(\w+)$", statement):
                fields.append((match[1], ctypes.c_void_p))
            else:
                match = re.match(r"(\w+) (\w+)$", statement)
                assert match is not None, f"{name}: {statement}"
                fields.append((match[2], types[match[1]]))
        found[name.removeprefix("dgemma_")] = types[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


@cache
def pointer_fields(struct: str) -> dict[tuple[str, ...], bool]:
    """The pointers of dgemma_<struct> by their paths, those of structs within it too; whether they are written."""
    body = re.search(rf"typedef struct dgemma_{struct} \{{(.*?)\}}", header_text(), re.DOTALL)
    assert body is not None
    found: dict[tuple[str, ...], bool] = {}
    for statement in (" ".join(s.split()) for s in body[1].split(";")):
        if match := re.match(r"(const )?\w+ ?\* ?(\w+)$", statement):
            found[match[2],] = match[1] is None
        elif (match := re.match(r"dgemma_(\w+) (\w+)$", statement)) and match[1] in structs():
            found |= {(match[2], *path): written for path, written in pointer_fields(match[1]).items()}
    return found


# Calls ---------------------------------------------------------------------------------------------------------------


def fill(struct: Any, values: dict[str, Any]) -> Any:
    """Puts numbers, tensors (their addresses), dtypes and nested dicts into a struct; its `tensors` keeps them."""
    struct.tensors = []
    for name, value in values.items():
        if isinstance(value, dict):
            struct.tensors += fill(getattr(struct, name), value).tensors
        elif isinstance(value, torch.Tensor):
            assert value.is_contiguous()
            struct.tensors.append(value)
            setattr(struct, name, value.data_ptr())
        else:
            setattr(struct, name, DTYPES[value] if isinstance(value, torch.dtype) else value)
    return struct


def operation(name: str, values: dict[str, Any]) -> Any:
    return fill(structs()[name](), values)


def context(variant: str | None = None, where: str = "cpu") -> Any:
    """A dgemma_cpu that runs in the calling thread, or a dgemma_cuda."""
    made: Any = structs()[where]()
    if where == "cpu":
        made.variant = BEST if variant is None else VARIANTS.index(variant)
    return made


def call(
    library: ctypes.CDLL, function: str, variant: str | None = None, struct: str | None = None, **values: Any
) -> tuple[int, str]:
    """Calls dgemma_<function>, e.g. cpu_dense; returns status and message. `struct`: its name, where it differs."""
    where, name = function.split("_", 1)
    op, place = operation(struct or name, values), context(variant, where)
    if where == "cuda" and hasattr(library, "sim_set_stream"):  # the test bed, where operators use another
        library.sim_set_stream(None)
    status = getattr(library, f"dgemma_{function}")(ctypes.byref(op), ctypes.byref(place))
    return status, place.message.decode()


def must(library: ctypes.CDLL, function: str, variant: str | None = None, **values: Any) -> None:
    """Calls a function that must succeed."""
    status, message = call(library, function, variant, **values)
    assert status == OK, f"{function}: {status} {message}"


def workspace(library: ctypes.CDLL, function: str, struct: str | None = None, **values: Any) -> torch.Tensor:
    """A workspace of the size that dgemma_<function>_workspace returns, aligned to 64 bytes and poisoned.

    `struct`: its name, where it differs.
    """
    size = getattr(library, f"dgemma_{function}_workspace")
    size.restype = ctypes.c_size_t
    wanted = size(ctypes.byref(operation(struct or function.split("_", 1)[1], values)))
    storage = torch.full((wanted + 64,), 0xFF, dtype=torch.uint8)
    start = -storage.data_ptr() % 64
    return storage[start : start + wanted]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(abi_listing(Path(temporary)), end="")
