"""Copies stored tensors to a GPU: threads read one pinned buffer full while the GPU takes what another holds.

A copy from the memory map would run in one thread, where page faults, the copy to the driver's own pinned memory and
the transfer follow each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from dgemma_ext.checkpoint.files import CheckpointInfo
from dgemma_ext.errors import CheckpointError

# Large enough that a transfer (1.3 ms at 50 GB/s) hides what the host does between two, small enough to pin quickly.
BUFFER_BYTES = 64 * 2**20
# One thread copies some 3 GB/s out of the page cache; four keep a disk's queue filled where the file is not there.
READERS = 4
# What one thread reads at a time: a sixteenth of a buffer, so that all of them end together.
READ_BYTES = BUFFER_BYTES // 16


class StagedCopies:
    """Copies from the files of an inspected checkpoint to tensors on `device`, in its current stream.

    advance: called with the bytes that were read since the last call. Leaving the context waits for the threads and
    closes the files; torch keeps the pinned memory for later copies.
    """

    def __init__(self, info: CheckpointInfo, device: torch.device, advance: Callable[[int], None]) -> None:
        self._info, self._device, self._advance = info, device, advance
        size = min(BUFFER_BYTES, max(info.loaded_bytes, 1))
        self._buffers = [_pinned(size) for _ in range(2)]
        self._views = [buffer.numpy().data for buffer in self._buffers]
        self._taken = [torch.cuda.Event() for _ in range(2)]
        self._current = self._filled = 0
        # Of the current buffer: what is read into it, and where its parts go.
        self._reads: list[Future[None]] = []
        self._parts: list[tuple[int, Tensor]] = []
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # The buffers and files must stay until the last thread is done with them.
        self._pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)

    def copy(self, name: str, target: Tensor, begin: int = 0) -> None:
        """Fills `target`, contiguous, with a stored tensor's bytes from `begin` on. It is filled after `flush`.

        Raises CheckpointError, here or in a later call, for a file that cannot be read.
        """
        stored = self._info.tensors[name]
        flat = target.reshape(-1).view(torch.uint8)
        done = 0
        while done < flat.numel():
            if self._filled == len(self._views[0]):
                self._send()
            count = min(len(self._views[0]) - self._filled, flat.numel() - done)
            self._read(name, stored.file, stored.offset + begin + done, count)
            self._parts.append((self._filled, flat[done : done + count]))
            self._filled += count
            done += count

    def flush(self) -> None:
        """Queues all copies: work that is queued on the device after this call sees them."""
        if self._parts:
            self._send()

    def _read(self, name: str, file: Path, offset: int, count: int) -> None:
        """Reads bytes of a file to the end of the current buffer, in the threads."""
        if file not in self._files:
            try:
                self._files[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"cannot be read: {error.strerror}", file=file) from error
        view = self._views[self._current][self._filled : self._filled + count]
        for first in range(0, count, READ_BYTES):
            part = view[first : first + READ_BYTES]
            self._reads.append(self._pool.submit(_read_exactly, self._files[file], part, offset + first, file, name))

    def _send(self) -> None:
        """Queues the copies out of the current buffer and turns to the other one, when the GPU has taken that."""
        for read in self._reads:
            read.result()
        for begin, target in self._parts:
            self._copy(target, self._buffers[self._current][begin : begin + target.numel()])
        self._taken[self._current].record(torch.cuda.current_stream(self._device))
        self._advance(self._filled)
        self._reads, self._parts, self._filled = [], [], 0
        self._current = 1 - self._current
        self._taken[self._current].synchronize()

    def _copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)


def _pinned(nbytes: int) -> Tensor:
    """Pinned memory; where the system gives none, other memory, from which copies are slower."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _read_exactly(descriptor: int, part: memoryview, offset: int, file: Path, name: str) -> None:
    done = 0
    while done < len(part):
        try:
            count = os.preadv(descriptor, [part[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", file=file, tensor=name) from error
        if count == 0:
            raise CheckpointError("is cut short: the file has become smaller", file=file, tensor=name)
        done += count
