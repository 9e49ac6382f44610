"""Reads weights from a checkpoint's files for the CPU: through a memory map, in pieces, every value checked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dgemma_ext.checkpoint.files import CheckpointInfo
from dgemma_ext.checkpoint.gguf_file import read_tensor
from dgemma_ext.checkpoint.stored import Experts, Matrix, Stored
from dgemma_ext.errors import CheckpointError
from dgemma_ext.ops.formats import Fp8Weight, Int4Weight, Int8Weight, Nvfp4Weight, QuantizedWeight
from dgemma_ext.units import format_bytes

# Values are checked and copied in pieces of 32 Mi elements: large enough to run at memory speed, small enough for a
# progress bar to move.
CHUNK_ELEMENTS = 1 << 25
# A load shorter than this many seconds shows no progress bar.
_PROGRESS_AFTER_SECONDS = 1.0
# How often a long work tells a log where it is.
_SECONDS_TO_A_LINE = 15.0

Weight = Tensor | QuantizedWeight


class MappedFiles:
    """The stored tensors of an inspected checkpoint, in memory maps that are closed with this object."""

    def __init__(self, info: CheckpointInfo) -> None:
        self.info = info
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()

    def tensor(self, name: str) -> Tensor:
        """Raises CheckpointError for a file that cannot be read."""
        file = self.info.tensors[name].file
        if self.info.is_gguf:
            return read_tensor(self.info.tensors[name])
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            tensor: Tensor = self._open[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot be read: {error}", file=file) from error
        return tensor

    def error(self, name: str, message: str) -> CheckpointError:
        """The error for a tensor that cannot be used."""
        return CheckpointError(message, file=self.info.tensors[name].file, tensor=name)


class WeightReader:
    """Reads weights of an inspected checkpoint, quantized ones as stored and the others as `dtype`.

    A tensor that is stored in `dtype` stays in the mapped file. Every method raises CheckpointError, naming file and
    tensor, for a file that cannot be read and for values that no weight may have.
    """

    def __init__(self, files: MappedFiles, dtype: torch.dtype, advance: Callable[[int], None]) -> None:
        self._files = files
        self._dtype = dtype
        self._advance = advance

    def read(self, stored: Stored) -> Weight:
        """A weight as stored; experts are stacked, and unquantized where they have more than one format."""
        if isinstance(stored, Experts):
            return self._read_experts(stored)
        if isinstance(stored, Matrix):
            return self._read_matrix(stored)
        return self.tensor(stored.name)

    def _read_matrix(self, stored: Matrix) -> Weight:
        if stored.kind == "unquantized":
            return self.tensor(stored.parts["values"])
        values = self.codes(stored.parts["values"], check_nan=stored.kind == "fp8")
        scales = self.scales(stored.parts["scales"], zero=stored.kind != "int8")
        match stored.kind:
            case "int8":
                return Int8Weight(values, scales.float().reshape(-1).expand(stored.shape[0]).contiguous())
            case "fp8":
                return Fp8Weight(values, scales.float().reshape(-1).expand(stored.shape[0]).contiguous())
            case "int4":
                return Int4Weight(values, scales)
            case "nvfp4" | "nvfp4-modelopt":
                global_scales = self.scales(stored.parts["global_scales"], zero=False).reshape(1)
                return Nvfp4Weight(values, scales.view(torch.uint8), global_scales, divides=stored.kind == "nvfp4")
        raise KeyError(stored.kind)

    def _read_experts(self, stored: Experts) -> Weight:
        if stored.kind in ("unquantized", "mixed"):
            stack = torch.empty(stored.shape, dtype=self._dtype, device="cpu")
            for expert, matrices in enumerate(stored.matrices):
                first = 0
                for matrix in matrices:
                    read = self._read_matrix(matrix)
                    rows = stack[expert, first : first + matrix.shape[0]]
                    rows.copy_(read if isinstance(read, Tensor) else read.dequantized(self._dtype))
                    first += matrix.shape[0]
            return stack
        # All matrices are quantized, in one format.
        experts = ([self._read_matrix(matrix) for matrix in matrices] for matrices in stored.matrices)
        return stack_weights(cast("Iterable[list[QuantizedWeight]]", experts), len(stored.matrices))

    def tensor(self, name: str) -> Tensor:
        """An unquantized tensor in the wanted dtype; every value is read once."""
        mapped = self._files.tensor(name)
        in_place = mapped.dtype == self._dtype
        result = mapped if in_place else torch.empty(mapped.shape, dtype=self._dtype, device="cpu")
        source, target = mapped.reshape(-1), result.view(-1)
        sums = []
        # Of a GGUF file the tensor's bytes are fewer than those of its values.
        nbytes, count = self._files.info.tensors[name].nbytes, target.numel()
        for begin in range(0, count, CHUNK_ELEMENTS):
            piece = target[begin : begin + CHUNK_ELEMENTS]
            if not in_place:
                piece.copy_(source[begin : begin + CHUNK_ELEMENTS])
            # A finite sum has finite terms, and summing runs at memory speed: 20 GB/s on one core where isfinite makes
            # 0.8 (and so does a sum into another dtype, which converts first).
            sums.append(piece.sum())
            done = begin + piece.numel()
            self._advance(done * nbytes // count - begin * nbytes // count)
        if sums and not torch.stack(sums).isfinite().all():
            # The sum of finite values can overflow, so check each value.
            for begin in range(0, target.numel(), CHUNK_ELEMENTS):
                bad = torch.nonzero(~target[begin : begin + CHUNK_ELEMENTS].isfinite())
                if len(bad):
                    position = begin + int(bad[0])
                    where = _indices(position, mapped.shape)
                    raise self._files.error(name, f"has {float(target[position])} at {where}, read as {self._dtype}")
        return result

    def codes(self, name: str, check_nan: bool) -> Tensor:
        """The bytes of a quantized tensor. check_nan: the bytes are e4m3, and NaN among them is an error."""
        mapped = self._files.tensor(name).view(torch.uint8)
        for piece in mapped.reshape(-1).split(CHUNK_ELEMENTS):
            if check_nan and bool(((piece & 0x7F) == 0x7F).any()):
                position = int(((mapped.reshape(-1) & 0x7F) == 0x7F).nonzero()[0])
                raise self._files.error(name, f"has nan at {_indices(position, mapped.shape)}")
            self._advance(piece.numel())
        return mapped

    def scales(self, name: str, zero: bool = True) -> Tensor:
        """Scales in the dtype that they are stored in. zero: may be zero, as the scale of a block of zeros is. Others,
        which a kernel may divide by, must not; a scale that is not finite is an error."""
        mapped = self._files.tensor(name)
        values = mapped.float()
        good = values.isfinite() if zero else values.isfinite() & (values != 0)
        bad = torch.nonzero(~good.reshape(-1))
        if len(bad):
            position = int(bad[0])
            value = float(values.reshape(-1)[position])
            raise self._files.error(name, f"has a scale of {value} at {_indices(position, mapped.shape)}")
        self._advance(mapped.nbytes)
        return mapped


def stack_weights(experts: Iterable[list[QuantizedWeight]], count: int) -> QuantizedWeight:
    """Stacks quantized matrices of experts to one weight [experts, rows, columns].

    experts: for each of `count` experts the matrices whose rows follow each other, all in one format. Each is written
    into the stack before the next one is made, so that no second copy of all exists.
    """
    stacks: dict[str, Tensor] = {}
    for index, matrices in enumerate(experts):
        for name in matrices[0].tensors():
            rows = torch.cat([matrix.tensors()[name] for matrix in matrices])
            if index == 0:
                stacks[name] = rows.new_empty((count, *rows.shape))
            stacks[name][index] = rows
    return replace(matrices[0], **stacks)


def _indices(position: int, shape: torch.Size) -> list[int]:
    """A position in row-major order as one index per dimension."""
    return [int(index) for index in torch.unravel_index(torch.tensor(position, device="cpu"), shape)]


class LoadProgress:
    """A progress bar in bytes.

    wanted: None shows the bar where stderr is a terminal and the work takes more than a second. lines: elsewhere it
    prints a line on stderr from time to time.
    """

    def __init__(self, title: str, total_bytes: int, wanted: bool | None, lines: bool = False) -> None:
        self._bar: Progress | None = None
        self._title, self._total, self._done = title, total_bytes, 0
        self._lines = lines and not sys.stderr.isatty()
        self._next_line = time.monotonic() + _SECONDS_TO_A_LINE
        self._started = False
        shown = sys.stderr.isatty() if wanted is None else wanted
        self._start_at = time.monotonic() + _PROGRESS_AFTER_SECONDS if wanted is None else 0.0
        if shown:
            columns = (title, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("load", total=total_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None and self._started:
            self._bar.stop()

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._lines and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_TO_A_LINE
            share = self._done / max(self._total, 1)
            print(
                f"{self._title}: {format_bytes(self._done)} of {format_bytes(self._total)} ({share:.0%})",
                file=sys.stderr,
                flush=True,
            )
        if self._bar is None:
            return
        if not self._started and time.monotonic() >= self._start_at:
            self._bar.start()
            self._started = True
        self._bar.update(self._task, advance=nbytes)
