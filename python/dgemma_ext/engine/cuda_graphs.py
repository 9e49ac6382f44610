"""Runs the steps of a batch on a GPU: each step is one CUDA graph; a whole canvas is one launch with WHILE nodes.

The output of a step is copied to pinned memory and followed by an event, so that the host waits for that copy only.
Operators that synchronise with the device cannot be captured: the fallbacks in torch, and all with DGEMMA_SYNC=1.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

import dgemma_ext._C as _C
from dgemma_ext import environment
from dgemma_ext.engine.runner import AsyncOutput, EagerRunner, StepRunner
from dgemma_ext.model import Cache, Network, PrefillChunk
from dgemma_ext.sampling import CanvasBatch, StepBuffers, StepOutput

# Calls before a capture, as torch's manual asks: libraries choose algorithms and allocate in their first calls.
_WARM_UP = 2
# Streams of a GPU in which products run for captures: that of the warm-up and that of the capture.
CAPTURE_STREAMS = 2


def can_capture(network: Network) -> bool:
    """Whether every operator of a step can be captured."""
    return operators_can_be_captured() and not network.options.debug


def operators_can_be_captured() -> bool:
    """Whether this build and the environment have operators that do not wait for a GPU."""
    fallback, syncs = environment.plain_kernels(), environment.synchronous()
    return _C.has_cuda() and not fallback and not syncs


def cuda_runner(network: Network, cache: Cache, batch: CanvasBatch, buffers: StepBuffers) -> StepRunner:
    """A runner for this batch: with graphs, or operator by operator where steps cannot be captured."""
    if can_capture(network):
        try:
            return CudaGraphRunner(network, cache, batch, buffers)
        except RuntimeError as error:
            _warn_once(f"a denoising step could not be captured in a CUDA graph, so it runs launch by launch: {error}")
    return CudaEagerRunner(network, cache, batch, buffers)


class CudaEagerRunner(EagerRunner):
    """Runs steps operator by operator; the host only waits for the copies of outputs."""

    repeats = False

    def __init__(self, network: Network, cache: Cache, batch: CanvasBatch, buffers: StepBuffers) -> None:
        super().__init__(network, cache, batch, buffers)
        # Two buffers: `async_loop` waits for one copy while the next one is queued.
        self._copies = [_PinnedOutput(batch) for _ in range(2)]
        self._copied = 0

    def copy_to_host(self) -> AsyncOutput:
        self._copied += 1
        copy = self._copies[self._copied % 2]
        copy.queue()
        return copy


class CudaGraphRunner(CudaEagerRunner):
    """Runs a step as one graph launch, and a whole canvas too where the driver can repeat a step by itself.

    A step without grammars and adapters is captured when the runner is made; one with either when a row first has it,
    and again when what it was captured with is another (Constraints.version, AdapterRows.version).
    """

    def __init__(self, network: Network, cache: Cache, batch: CanvasBatch, buffers: StepBuffers) -> None:
        super().__init__(network, cache, batch, buffers)
        self._steps_left = torch.zeros(1, dtype=torch.int32, device=network.device)
        self._place = _capture_place(batch.slot.device)
        self._free = self._capture(constrained=False, adapted=False)
        # With grammars, with adapters → the step, None where it could not be captured, and what it was captured with.
        self._others: dict[tuple[bool, bool], _CapturedStep | None] = {}
        self._versions: dict[tuple[bool, bool], tuple[int, int]] = {}
        self.repeats = self._free.loop is not None

    def step(self, chunks: Sequence[PrefillChunk] = ()) -> None:
        captured = None if chunks else self._captured_step()  # with chunks shapes depend on them
        if captured is None:
            super().step(chunks)
        else:
            self._place.launch(lambda _stream: captured.graph.replay())

    def run_until_finished(self, max_steps: int) -> None:
        captured = self._captured_step()
        if captured is None or captured.loop is None:
            super().run_until_finished(max_steps)  # the host looks after every step
        else:
            self._launch_loop(captured.loop, max_steps)

    def _captured_step(self) -> _CapturedStep | None:
        """The step for what the rows have now; None where it could not be captured."""
        constraints, adapters = self._batch.constraints, self._batch.adapters
        rows = (self._batch.first_row, self._batch.first_row + self._batch.rows)
        constrained, adapted = constraints.any_between(*rows), bool(adapters.between(*rows))
        if not constrained and not adapted:
            return self._free
        if not adapters.can_be_captured(*rows):
            return None
        if constrained:
            constraints.update()
        if adapted:
            adapters.update()
        kind, versions = (constrained, adapted), (constraints.version * constrained, adapters.version * adapted)
        if self._versions.get(kind) != versions:
            # The last one is dropped first: both would need memory at once.
            self._versions[kind], self._others[kind] = versions, None
            try:
                self._others[kind] = self._capture(*kind)
            except RuntimeError as error:
                what = " and ".join(["grammars"] * constrained + ["adapters"] * adapted)
                _warn_once(f"a denoising step with {what} could not be captured, so it runs launch by launch: {error}")
        return self._others[kind]

    def _capture(self, constrained: bool, adapted: bool) -> _CapturedStep:
        step = partial(self._run_step, constrained=constrained, adapted=adapted)
        batch = self._batch
        flags = (batch.state.active.data_ptr(), batch.slot.data_ptr(), batch.rows, self._steps_left.data_ptr())
        with torch.cuda.device(self._network.device), _nothing_active(batch):
            captured = _CapturedStep(_captured(self._place, step))
            try:
                loop = _C.GraphLoop(captured.graph.raw_cuda_graph(), *flags)
                # Run once, because a driver may reject the graph only when it is launched.
                self._launch_loop(loop, 1)
                torch.cuda.current_stream().synchronize()
                captured.loop = loop
            except RuntimeError as error:
                _warn_once(f"the host queues every denoising step by itself, one ahead: {error}")
        return captured

    def _launch_loop(self, loop: _C.GraphLoop, max_steps: int) -> None:
        self._steps_left.fill_(max_steps)
        with torch.cuda.device(self._place.device):
            self._place.launch(lambda stream: loop.launch(stream.cuda_stream))


@dataclass
class _CapturedStep:
    """The graph of a step, and its repetition on the GPU where the driver has that."""

    graph: torch.cuda.CUDAGraph
    loop: _C.GraphLoop | None = None


class _PinnedOutput:
    """An output that is copied to pinned memory."""

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
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)


@contextmanager
def _nothing_active(batch: CanvasBatch) -> Iterator[None]:
    """Deactivates all rows inside the block, so that steps change no canvas."""
    active = batch.state.active.clone()
    batch.state.active.zero_()
    try:
        yield
    finally:
        batch.state.active.copy_(active)


class _CollectorRests:
    """Python collects nothing while any thread is in a block of this context, which may be nested.

    A collection could destroy another graph, which is an error while one is captured. And it runs finalizers: one that
    waits for another scheduler must not run in a thread that holds a lock which that scheduler waits for.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._collects = False

    def __enter__(self) -> None:
        collects = gc.isenabled()
        gc.disable()  # before this lock too is held
        with self._lock:
            if self._blocks == 0:
                # Another thread may have left its last block since.
                self._collects = collects or gc.isenabled()
                gc.disable()
            self._blocks += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0 and self._collects:
                gc.enable()


_collector_rests = _CollectorRests()


@dataclass
class _CapturePlace:
    """Streams and memory for all captures on one GPU, and the turns of the graphs that share them.

    All graphs share one pool, because all that outlives a step is in the batch's buffers. So one graph runs at a time,
    whichever scheduler and thread it is of: `launch` queues it behind the last one. `lock` also keeps captures of
    several threads apart, which would use one stream.

    Captures use their own stream, because torch's capture stream is shared by all GPUs and other users of CUDA graphs
    free its memory. Warm-up uses another, so that the workspace that cuBLAS keeps for the capture's stream is in the
    pool, from which only captures allocate. `keeper` is a graph that keeps the pool alive when all others are gone:
    torch 2.11 cannot capture into a pool that was freed.
    """

    device: torch.device
    warm_up: torch.cuda.Stream
    stream: torch.cuda.Stream
    pool: torch.cuda._POOL_HANDLE
    keeper: torch.cuda.CUDAGraph
    lock: threading.Lock = field(default_factory=threading.Lock)
    last: torch.cuda.Stream | None = None

    def launch(self, queue: Callable[[torch.cuda.Stream], None]) -> None:
        """Calls `queue`, which launches a graph in the current stream. It begins when all launches before it are done.

        Launches in one stream follow each other; the first one in another stream waits on the GPU.
        """
        with _collector_rests, self.lock:
            stream = torch.cuda.current_stream(self.device)
            if self.last is not None and self.last != stream:
                stream.wait_stream(self.last)
            self.last = stream
            queue(stream)


_places: dict[torch.device, _CapturePlace] = {}
_places_lock = threading.Lock()


def _capture_place(device: torch.device) -> _CapturePlace:
    if device not in _places:
        gc.collect()
    with _collector_rests, _places_lock:
        if device not in _places:
            with torch.cuda.device(device):
                streams, graph = (torch.cuda.Stream(), torch.cuda.Stream()), torch.cuda.CUDAGraph()
                place = _CapturePlace(device, *streams, torch.cuda.graph_pool_handle(), graph)
                with _capturing(place, graph):
                    torch.zeros(1, dtype=torch.float32, device=device)
            _places[device] = place
        return _places[device]


def capture_pool(device: torch.device) -> torch.cuda._POOL_HANDLE | None:
    """The memory pool of all graphs on this GPU; None before the first capture."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    place = _places.get(device)
    return None if place is None else place.pool


def _captured(place: _CapturePlace, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Captures a step in a graph."""
    gc.collect()
    with _collector_rests, place.lock:
        current = torch.cuda.current_stream()
        place.warm_up.wait_stream(current)
        with torch.cuda.stream(place.warm_up):
            for _ in range(_WARM_UP):
                step()
        current.wait_stream(place.warm_up)
        # keep_graph, because GraphLoop copies the graph.
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with _capturing(place, graph):
            step()
        graph.instantiate()
        return graph


@contextmanager
def _capturing(place: _CapturePlace, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Captures the work inside the block. A failure restores the thread's stream and the allocator."""
    current = torch.cuda.current_stream()
    try:
        # thread_local, so that work of other threads does not break the capture.
        with (
            _collector_rests,
            torch.cuda.graph(graph, pool=place.pool, stream=place.stream, capture_error_mode="thread_local"),
        ):
            yield
    except BaseException:
        torch.cuda.set_stream(current)
        # Where ending a capture fails, torch 2.11 leaves the allocator in it; otherwise this call raises RuntimeError.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(place.device.index, place.pool)
        raise


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
