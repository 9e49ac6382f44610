"""Times work on a GPU by its own clock, for the benchmarks of every family.

A round flushes the L2 cache (the next call finds none of its inputs there), then runs the call between two events.
Rounds are enqueued without waiting, so that the host's time to launch hides behind the flush; the median of them is
reported. `floor` is the time that bytes and operations take at best on this device: by the read bandwidth that is
measured here in the same process, not by the data sheet, and by the data sheet's tensor-core peak.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 30
WARM_UP = 3
# Twice the largest L2 cache of the supported GPUs (96 MB on an RTX 5090).
FLUSH_BYTES = 192 * 2**20
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
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def microseconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median GPU time of one call with a cold L2 cache."""
    for _ in range(WARM_UP):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for begin, end in events:
        _flush_buffer().zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in events)


@cache
def read_bandwidth() -> float:
    """Bytes per second of a sum over a large tensor; the denominator of every share of the floor."""
    values = torch.empty(STREAM_BYTES // 4, dtype=torch.float32, device="cuda").fill_(1.0)
    return STREAM_BYTES / (microseconds(lambda: torch.sum(values), rounds=10) * 1e-6)


def floor_microseconds(work: Work) -> float:
    peak = PEAK_TERAFLOPS.get(torch.cuda.get_device_capability())
    by_operations = work.operations / (peak * 1e6) if peak else 0.0
    return max(work.bytes / read_bandwidth() * 1e6, by_operations)


def record(
    benchmark: BenchmarkFixture,
    call: Callable[[], object],
    work: Work,
    goal: float | None = None,
    peer: Callable[[], object] | None = None,
    rounds: int = ROUNDS,
) -> None:
    """Measures a call, and its peer in the same run, and writes the figures to the benchmark's extra_info."""
    time = microseconds(call, rounds)
    floor = floor_microseconds(work)
    figures = {
        "microseconds": time,
        "floor": floor,
        "floor_share": floor / time,
        "gigabytes_per_second": work.bytes / time * 1e-3,
        "teraflops": work.operations / time * 1e-6,
    }
    if goal is not None:
        figures["goal"] = goal
    if peer is not None:
        figures["peer"] = microseconds(peer, rounds)
        figures["ratio"] = time / figures["peer"]
    benchmark.extra_info.update(figures)

    def once() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=5)
