"""The steps of a batch on a GPU: a step is a captured CUDA graph, a canvas one launch where the driver has WHILE nodes.

The output of a step is copied into pinned memory with an event behind it, so that the host waits for that copy alone.
Operators that wait for the device themselves cannot be captured: the fallback torch forms, and all with DGEMMA_SYNC=1.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dgemma_ext import _C
from dgemma_ext.engine.runner import AsyncOutput, EagerRunner, StepRunner
from dgemma_ext.model import Cache, Network, PrefillChunk
from dgemma_ext.sampling import CanvasBatch, StepBuffers, StepOutput

# Calls before a capture: libraries choose algorithms and allocate in their first, torch's manual asks for some.
_WARM_UP = 2


def can_capture(network: Network) -> bool:
    """Whether every operator of a step can be captured."""
    plain, waits = os.environ.get("DGEMMA_KERNELS") == "plain", os.environ.get("DGEMMA_SYNC", "0") not in ("", "0")
    return _C.has_cuda() and not plain and not waits and not network.options.debug


def cuda_runner(network: Network, cache: Cache, batch: CanvasBatch, buffers: StepBuffers) -> StepRunner:
    """Runs the steps of this batch: in graphs, or operator by operator where they cannot be captured."""
    if can_capture(network):
        try:
            return CudaGraphRunner(network, cache, batch, buffers)
        except RuntimeError as error:
            _warn_once(f"a denoising step could not be captured in a CUDA graph, so it runs launch by launch: {error}")
    return CudaEagerRunner(network, cache, batch, buffers)


class CudaEagerRunner(EagerRunner):
    """Operator by operator; the host waits for nothing but the copies of outputs."""

    repeats = False

    def __init__(self, network: Network, cache: Cache, batch: CanvasBatch, buffers: StepBuffers) -> None:
        super().__init__(network, cache, batch, buffers)
        # Two: a loop that is a step behind waits for one copy while the next one is under way.
        self._copies = [_PinnedOutput(batch) for _ in range(2)]
        self._copied = 0

    def copy_to_host(self) -> AsyncOutput:
        self._copied += 1
        copy = self._copies[self._copied % 2]
        copy.queue()
        return copy


class CudaGraphRunner(CudaEagerRunner):
    """A step is one launch of a graph, and so is a whole canvas, where the driver can repeat a step by itself."""

    def __init__(self, network: Network, cache: Cache, batch: CanvasBatch, buffers: StepBuffers) -> None:
        super().__init__(network, cache, batch, buffers)
        self._steps_left = torch.zeros(1, dtype=torch.int32, device=network.device)
        flags = (batch.state.active.data_ptr(), batch.slot.data_ptr(), batch.rows, self._steps_left.data_ptr())
        with torch.cuda.device(network.device), _nothing_active(batch):
            self._graph = _captured(batch, super().step)
            try:
                self._loop = _C.GraphLoop(self._graph.raw_cuda_graph(), *flags)
                # Tried once, so that what a driver refuses at its launch is met here.
                self.run_until_finished(1)
                torch.cuda.current_stream().synchronize()
                self.repeats = True
            except RuntimeError as error:
                _warn_once(f"the host queues every denoising step by itself, one ahead: {error}")

    def step(self, chunks: Sequence[PrefillChunk] = ()) -> None:
        if chunks:
            super().step(chunks)  # of a shape that is not met again
        else:
            self._graph.replay()

    def run_until_finished(self, max_steps: int) -> None:
        self._steps_left.fill_(max_steps)
        device = self._steps_left.device
        with torch.cuda.device(device):
            self._loop.launch(torch.cuda.current_stream(device).cuda_stream)


class _PinnedOutput:
    """An output on its way to pinned memory."""

    def __init__(self, batch: CanvasBatch) -> None:
        self._source = batch.output
        self._buffer = _pinned_like(batch.output)
        self._output = StepOutput.over(self._buffer, batch.length)
        self._done = torch.cuda.Event()

    def queue(self) -> None:
        self._buffer.copy_(self._source, non_blocking=True)
        self._done.record(torch.cuda.current_stream(self._source.device))

    def wait(self) -> StepOutput:
        self._done.synchronize()
        return self._output


def _pinned_like(tensor: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class _CapturePlace:
    """Streams and memory of all captures on one GPU. One graph runs at a time, and what outlives a step lies in the
    batch's buffers, so that all graphs share one pool.

    Captures have a stream of their own: torch's is one for all GPUs, and other users of CUDA graphs free what belongs
    to it. Warm-up has another, so that the workspace that cuBLAS keeps for the capture's stream lies in the pool, from
    which nothing but captures is served. `keeper` is a graph that keeps the pool when all others are gone: torch 2.11
    cannot capture into a pool that was given up.
    """

    warm_up: torch.cuda.Stream
    stream: torch.cuda.Stream
    pool: torch.cuda._POOL_HANDLE
    keeper: torch.cuda.CUDAGraph


@cache
def _capture_place(device: torch.device) -> _CapturePlace:
    with torch.cuda.device(device):
        place = _CapturePlace(
            torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        )
        with _capturing(place, place.keeper, device):
            torch.zeros(1, device=device)
    return place


def _captured(batch: CanvasBatch, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The step as a graph."""
    place = _capture_place(batch.slot.device)
    current = torch.cuda.current_stream()
    place.warm_up.wait_stream(current)
    with torch.cuda.stream(place.warm_up):
        for _ in range(_WARM_UP):
            step()
    current.wait_stream(place.warm_up)
    # Kept, so that a loop can hold a copy of it.
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with _capturing(place, graph, batch.slot.device):
        step()
    graph.instantiate()
    return graph


@contextmanager
def _capturing(place: _CapturePlace, graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Captures what runs inside. After a failure the thread's stream and the allocator are as before."""
    current = torch.cuda.current_stream()
    # A collection could destroy another graph, which is an error while one is captured.
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        # "thread_local": what other threads do meanwhile does not concern the capture.
        with torch.cuda.graph(graph, pool=place.pool, stream=place.stream, capture_error_mode="thread_local"):
            yield
    except BaseException:
        torch.cuda.set_stream(current)
        # torch 2.11 leaves the allocator in the capture where the end of one fails; where it does not, this is refused.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, place.pool)
        raise
    finally:
        if collects:
            gc.enable()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
