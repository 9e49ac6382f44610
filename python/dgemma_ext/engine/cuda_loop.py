"""A batch's steps on a GPU: a step is a captured CUDA graph, a canvas one launch where the driver has WHILE nodes.

What the host wants to know is copied into pinned memory with an event behind it, so that it waits for that copy alone.
Operators that wait for the device themselves cannot be captured: the plain torch forms, and all with DGEMMA_SYNC=1.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch

from dgemma_ext import _C
from dgemma_ext.engine.loop import Device, DirectDevice, Look
from dgemma_ext.sampling.canvas_batch import CanvasBatch, Told, told_bytes

if TYPE_CHECKING:
    from dgemma_ext.diffusion_gemma import DiffusionGemma
    from dgemma_ext.model.cache import Cache
    from dgemma_ext.model.joint_pass import Pending

# Calls before a capture: libraries choose algorithms and allocate in their first, torch's manual asks for some.
_WARM_UP = 2


def graphs_can_serve() -> bool:
    """Whether every operator of a step can be captured."""
    plain, waits = os.environ.get("DGEMMA_KERNELS") == "plain", os.environ.get("DGEMMA_SYNC", "0") not in ("", "0")
    return _C.has_cuda() and not plain and not waits


def cuda_device(model: DiffusionGemma, cache: Cache, batch: CanvasBatch) -> Device:
    """Where steps of this batch run: in graphs, or operator by operator where they cannot be captured."""
    if graphs_can_serve():
        try:
            return GraphDevice(model, cache, batch)
        except RuntimeError as error:
            _say_once(f"a denoising step could not be captured in a CUDA graph, so it runs launch by launch: {error}")
    return LaunchDevice(model, cache, batch)


class LaunchDevice(DirectDevice):
    """Operator by operator; the host waits for nothing but the copies of its looks."""

    repeats = False

    def __init__(self, model: DiffusionGemma, cache: Cache, batch: CanvasBatch) -> None:
        super().__init__(model, cache, batch)
        # Two: a driver that is a step late waits for one copy while the next one is under way.
        self._copies = [_PinnedCopy(batch) for _ in range(2)]
        self._looks = 0

    def look(self) -> Look:
        self._looks += 1
        copy = self._copies[self._looks % 2]
        copy.queue()
        return copy


class GraphDevice(LaunchDevice):
    """A step is one launch of a graph, and so is a whole canvas, where the driver can repeat a step by itself."""

    def __init__(self, model: DiffusionGemma, cache: Cache, batch: CanvasBatch) -> None:
        super().__init__(model, cache, batch)
        self._steps_left = torch.zeros(1, dtype=torch.int32, device=model.device)
        flags = (batch.state.active.data_ptr(), batch.slot.data_ptr(), batch.rows, self._steps_left.data_ptr())
        with torch.cuda.device(model.device), _nothing_active(batch):
            self._graph = _captured(batch, super().step)
            try:
                self._loop = _C.GraphLoop(self._graph.raw_cuda_graph(), *flags)
                # Tried once, so that what a driver refuses at its launch is met here.
                self.until_finished(1)
                torch.cuda.current_stream().synchronize()
                self.repeats = True
            except RuntimeError as error:
                _say_once(f"the host queues every denoising step by itself, one ahead: {error}")

    def step(self, pending: Sequence[Pending] = ()) -> None:
        if pending:
            super().step(pending)  # of a shape that is not met again
        else:
            self._graph.replay()

    def until_finished(self, most: int) -> None:
        self._steps_left.fill_(most)
        device = self._steps_left.device
        with torch.cuda.device(device):
            self._loop.launch(torch.cuda.current_stream(device).cuda_stream)


class _PinnedCopy:
    """What was told, on its way to the host."""

    def __init__(self, batch: CanvasBatch) -> None:
        self._source = batch.told
        self._buffer = _pinned_like(batch.told)
        self._told = Told.over(self._buffer, batch.told.numel() // told_bytes(1, batch.length), batch.length)
        self._done = torch.cuda.Event()

    def queue(self) -> None:
        self._buffer.copy_(self._source, non_blocking=True)
        self._done.record(torch.cuda.current_stream(self._source.device))

    def wait(self) -> Told:
        self._done.synchronize()
        return self._told


def _pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


@contextmanager
def _nothing_active(batch: CanvasBatch) -> Iterator[None]:
    """In which steps change nothing of the canvases that are under way."""
    active = batch.state.active.clone()
    batch.state.active.zero_()
    try:
        yield
    finally:
        batch.state.active.copy_(active)


def _captured(batch: CanvasBatch, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The step as a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    # Kept, so that a loop can hold a copy of it.
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    # What other threads do meanwhile is theirs.
    with torch.cuda.graph(graph, pool=_pool(batch.slot.device), capture_error_mode="thread_local"):
        step()
    graph.instantiate()
    return graph


@cache
def _pool(device: torch.device) -> torch.cuda._POOL_HANDLE:
    """The memory of all graphs of a GPU: one runs at a time, and what outlives a step lies in the batch's buffers."""
    with torch.cuda.device(device):
        return torch.cuda.graph_pool_handle()


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
