"""Times work on a GPU by its own clock, for the benchmarks of every family.

A round flushes the L2 cache (the next call finds none of its inputs there), keeps the GPU busy for longer than the host
takes to queue the call, then runs the call between two events: what is measured is the GPU's time and never the host's.
The median of the rounds is reported. `floor` is the time that bytes and operations take at best on this device: by the
read bandwidth that is measured here in the same process, not by the data sheet, and by the data sheet's tensor-core
peak.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 30
WARM_UP = 3
# Twice the largest L2 cache of the supported GPUs (96 MB on an RTX 5090).
FLUSH_BYTES = 192 * 2**20
# For how long the GPU is kept busy: so many times what the host took to queue a call, and so much more, at most MOST.
HOST_FACTOR = 3.0
HOST_MARGIN_MICROSECONDS = 100.0
MOST_BUSY_MICROSECONDS = 50_000.0
# The read bandwidth is measured on this many bytes: enough that launch costs do not count.
STREAM_BYTES = 4 * 2**30
# Dense bf16 peak by data sheet, TFLOP/s, by compute capability: H100 and H200 SXM, A100, RTX 4090, RTX 5090.
PEAK_TERAFLOPS = {(9, 0): 989.0, (8, 0): 312.0, (8, 9): 165.2, (12, 0): 209.5}


@dataclass(frozen=True)
class Work:
    """Bytes and FLOPs of a call, each input counted once."""

    bytes: float
    operations: float = 0.0


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES // 4, device="cuda")


def _flush() -> None:
    """Reads, so that the L2 cache has nothing to write back while the call runs."""
    _flush_buffer().sum()


@dataclass(frozen=True)
class Timing:
    """Medians of a call. hidden: all of it was queued before the GPU came to it, in most rounds, which alone count."""

    microseconds: float
    host_microseconds: float
    hidden: bool


def timed(call: Callable[[], object], rounds: int = ROUNDS) -> Timing:
    """The GPU's time of one call, with a cold L2 cache. A call that waits for the GPU by itself is never hidden."""
    host = max(_queued(call) for _ in range(WARM_UP))
    busy = min(HOST_FACTOR * host + HOST_MARGIN_MICROSECONDS, MOST_BUSY_MICROSECONDS)
    cycles = round(busy * _cycles_per_microsecond())
    measured = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        _flush()
        torch.cuda._sleep(cycles)
        began = time.perf_counter()
        begin.record()
        call()
        end.record()
        queued = (time.perf_counter() - began) * 1e6
        torch.cuda.synchronize()
        measured.append((begin.elapsed_time(end) * 1e3, queued))
    return of_rounds(measured, busy)


def of_rounds(rounds: Sequence[tuple[float, float]], busy: float) -> Timing:
    """rounds: the GPU's and the host's microseconds of each; busy: for how long the GPU was kept busy before it."""
    hidden = [one for one in rounds if one[1] < busy]
    counted = hidden if 2 * len(hidden) > len(rounds) else rounds
    gpu, host = (statistics.median(column) for column in zip(*counted, strict=True))
    return Timing(gpu, host, counted is hidden)


def microseconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median GPU time of one call with a cold L2 cache."""
    return timed(call, rounds).microseconds


def microseconds_with_host(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The same with nothing to hide behind but the flush: where the host queues more slowly than the GPU works, the
    host's time."""
    for _ in range(WARM_UP):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for begin, end in events:
        _flush()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in events)


def _queued(call: Callable[[], object]) -> float:
    """Microseconds that the host takes to queue a call while the GPU has nothing to do."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


@cache
def _cycles_per_microsecond() -> float:
    cycles = 10_000_000
    for _ in range(2):  # the first one wakes the clocks
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
    return cycles / (begin.elapsed_time(end) * 1e3)


@cache
def read_bandwidth() -> float:
    """Bytes per second of a sum over a large tensor; the denominator of every share of the floor."""
    values = torch.empty(STREAM_BYTES // 4, dtype=torch.float32, device="cuda").fill_(1.0)
    return STREAM_BYTES / (microseconds(lambda: torch.sum(values), rounds=10) * 1e-6)


def floor_microseconds(work: Work) -> float:
    peak = PEAK_TERAFLOPS.get(torch.cuda.get_device_capability())
    by_operations = work.operations / (peak * 1e6) if peak else 0.0
    return max(work.bytes / read_bandwidth() * 1e6, by_operations)


def figures_of(microseconds: float, work: Work) -> dict[str, float]:
    floor = floor_microseconds(work)
    return {
        "microseconds": microseconds,
        "floor": floor,
        "floor_share": floor / microseconds,
        "gigabytes_per_second": work.bytes / microseconds * 1e-3,
        "teraflops": work.operations / microseconds * 1e-6,
    }


def record(
    benchmark: BenchmarkFixture,
    call: Callable[[], object],
    work: Work,
    goal: float | None = None,
    peer: Callable[[], object] | None = None,
    rounds: int = ROUNDS,
    with_host: bool = False,
) -> None:
    """Measures a call, and its peer in the same run, and writes the figures to the benchmark's extra_info."""
    clock = microseconds_with_host if with_host else microseconds
    figures = figures_of(clock(call, rounds), work)
    if goal is not None:
        figures["goal"] = goal
    if peer is not None:
        figures["peer"] = microseconds(peer, rounds)
        figures["ratio"] = figures["microseconds"] / figures["peer"]
    benchmark.extra_info.update(figures)

    def once() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=5)
