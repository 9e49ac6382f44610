"""libdgemma for 64-bit ARM, compiled on this machine and run under an emulator.

library = Remote()                                   # in place of the ctypes.CDLL of c_interface.load()
call(library, "cpu_rms_norm", tokens=3, ...)         # tests/remote_call.c makes the call there
"""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import struct
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from c_interface import INCLUDE, ROOT, declared_functions, pointer_fields, run

TARGET = "aarch64-linux-gnu"
COMPILER = f"{TARGET}-gcc"
QEMU = "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, f"{TARGET}-g++", QEMU, "cmake", "ninja") if shutil.which(tool) is None]
BUILD = ROOT / "build" / "cross" / "aarch64"


@cache
def build() -> Path:
    """The folder of the library for the other machine, up to date."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        toolchain = f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-linux-gnu.cmake'}"
        run("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", toolchain, "-DDGEMMA_WARNINGS_AS_ERRORS=ON")
        run("cmake", "--build", BUILD)
        link = [f"-I{INCLUDE.parent}", f"-L{BUILD}", "-Wl,--no-as-needed", "-ldgemma", "-ldl"]
        source = ROOT / "tests" / "remote_call.c"
        run(COMPILER, "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", source, "-o", BUILD / "remote_call", *link)
    return BUILD


def emulated(program: Path, *arguments: str | Path) -> list[str]:
    """The command that runs a program of the other machine here."""
    return [QEMU, "-L", f"/usr/{TARGET}", "-E", f"LD_LIBRARY_PATH={BUILD}", str(program), *map(str, arguments)]


class Remote:
    """Functions of the library by their names, as a ctypes.CDLL gives them, for structs of c_interface.fill."""

    def __init__(self) -> None:
        program = emulated(build() / "remote_call")
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._functions: dict[str, Callable[..., int]] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in declared_functions() or name.startswith("dgemma_cuda"):
            raise AttributeError(name)

        def function(operation: Any, place: Any = None) -> int:
            return self._call(name, _object(operation), _object(place))

        return self._functions.setdefault(name, function)

    def _call(self, name: str, operation: ctypes.Structure | None, place: ctypes.Structure | None) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        blocks = _blocks(getattr(operation, "tensors", []))
        pointers = _pointers(operation, blocks) if operation is not None else []
        parts = [name.encode(), bytes(operation or b""), bytes(place or b"")]
        sent = [struct.pack("<5I", *map(len, parts), len(blocks), len(pointers)), *parts]
        for start, end in blocks:
            sent += [struct.pack("<2Q", end - start, start % 64), ctypes.string_at(start, end - start)]
        sent += [struct.pack("<3Q", *pointer) for pointer in pointers]
        self._process.stdin.write(b"".join(sent))
        self._process.stdin.flush()
        (result,) = struct.unpack("<q", self._take(8))
        if place is not None:
            ctypes.memmove(ctypes.byref(place), self._take(ctypes.sizeof(place)), ctypes.sizeof(place))
        for start, end in blocks:
            ctypes.memmove(start, self._take(end - start), end - start)
        return int(result)

    def _take(self, count: int) -> bytes:
        assert self._process.stdout is not None
        taken = self._process.stdout.read(count)
        assert len(taken) == count, f"the library's process ended: {self._process.wait()}"
        return taken


def _object(reference: Any) -> ctypes.Structure | None:
    """What ctypes.byref was given."""
    return None if reference is None else reference._obj


def _blocks(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """The memory of the tensors, in pieces that do not touch: two tensors keep their distance where they share one."""
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel() > 0)
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _pointers(operation: ctypes.Structure, blocks: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Each pointer of the struct into a block: its place, the block's number, the offset there."""
    found = []
    for path in pointer_fields(type(operation).__name__.removeprefix("dgemma_")):
        place, inner = 0, operation
        for name in path[:-1]:
            place += getattr(type(inner), name).offset
            inner = getattr(inner, name)
        address = getattr(inner, path[-1])
        for number, (start, end) in enumerate(blocks):
            if address is not None and start <= address < end:
                found.append((place + getattr(type(inner), path[-1]).offset, number, address - start))
    return found
