"""The highest bandwidth and FLOP/s of a device, measured in the run that uses them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from dgemma_ext.engine import available_bytes
from dgemma_ext.ops import grouped_gemm
from dgemma_ext.profile.count import PLAIN

# Larger than the caches of CPUs (up to 384 MB of shared L3 in a server) and GPUs (50 to 96 MB).
_CPU_STREAM_BYTES = 2**29
_GPU_STREAM_BYTES = 2**32
# Rows, inner and outer size of the product: large enough that launch costs do not count, and about 0.1 s on a core.
_CPU_PRODUCT = (512, 2816, 4096)
_GPU_PRODUCT = (8192, 8192, 8192)
# The best of so many rounds counts, because a floor is the least time that the device can take.
_ROUNDS = 5
# After a run of more seconds the device is measured again, because other work may have slowed the first measurement.
_LONG = 5.0


@dataclass(frozen=True)
class Machine:
    """The measured peaks of a device. `bandwidth`: bytes read per second; `peaks`: FLOP/s by kind of product."""

    device: str
    bandwidth: float
    peaks: Mapping[str, float]

    def floor(self, moved: float, flops: Mapping[str, float]) -> float:
        """The least seconds that `moved` bytes and `flops` (by kind of product) take: the larger of the two."""
        products = sum(count / self.peaks.get(kind, self.peaks[PLAIN]) for kind, count in flops.items())
        return max(moved / self.bandwidth, products)

    def or_better(self, other: Machine) -> Machine:
        """The better values of two measurements of one device."""
        peaks = {kind: max(peak, other.peaks.get(kind, 0.0)) for kind, peak in self.peaks.items()}
        return Machine(self.device, max(self.bandwidth, other.bandwidth), {**other.peaks, **peaks})


@cache
def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measures a device by a sum over a large tensor and by large products, once in a process."""
    return _measure_gpu(device, dtype) if device.type == "cuda" else _measure_cpu(dtype)


def measure_after(work_seconds: float, device: torch.device, dtype: torch.dtype) -> Machine:
    """`measure` after a run of `work_seconds`; a long run is followed by another measurement."""
    before = measure(device, dtype)
    if work_seconds < _LONG:
        return before
    return before.or_better(measure.__wrapped__(device, dtype))


def _measure_cpu(dtype: torch.dtype) -> Machine:
    values = torch.ones(_CPU_STREAM_BYTES // 4, dtype=torch.float32, device="cpu")
    bandwidth = _CPU_STREAM_BYTES / _best_seconds(values.sum)
    del values
    rows, inner, outer = _CPU_PRODUCT
    left = torch.randn(rows, inner, dtype=torch.float32, device="cpu").to(dtype)
    right = torch.randn(outer, inner, dtype=torch.float32, device="cpu").to(dtype)
    flops = 2.0 * rows * inner * outer
    # The faster of torch's product and this package's own.
    seconds = min(
        _best_seconds(lambda: torch.mm(left, right.t())),
        _best_seconds(lambda: grouped_gemm.dense(left, right)),
    )
    return Machine(f"cpu, {torch.get_num_threads()} threads", bandwidth, {PLAIN: flops / seconds})


def _measure_gpu(device: torch.device, dtype: torch.dtype) -> Machine:
    # A model may have left little room.
    stream_bytes = min(_GPU_STREAM_BYTES, (available_bytes(device) or _GPU_STREAM_BYTES) // 4)
    values = torch.ones(stream_bytes // 4, dtype=torch.float32, device=device)
    bandwidth = values.nbytes / _best_gpu_seconds(values.sum)
    del values
    rows, inner, outer = _GPU_PRODUCT
    left = torch.randn(rows, inner, dtype=torch.float32, device=device).to(dtype)
    right = torch.randn(outer, inner, dtype=torch.float32, device=device).to(dtype)
    flops = 2.0 * rows * inner * outer
    peaks = {PLAIN: flops / _best_gpu_seconds(lambda: torch.mm(left, right.t()))}
    # These functions are private to torch. Without one, floors of such products use the peak of the others.
    integers = (left.to(torch.int8), right.to(torch.int8))
    with contextlib.suppress(AttributeError, RuntimeError):
        peaks["int8"] = flops / _best_gpu_seconds(lambda: torch._int_mm(integers[0], integers[1].t()))
    if torch.cuda.get_device_capability(device) >= (8, 9):  # the first with products of 8 bits
        narrow = (left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn))
        one = torch.ones((), dtype=torch.float32, device=device)

        def product_of_8_bits() -> torch.Tensor:
            return torch._scaled_mm(narrow[0], narrow[1].t(), one, one, out_dtype=torch.bfloat16)

        with contextlib.suppress(AttributeError, RuntimeError):
            peaks["fp8"] = flops / _best_gpu_seconds(product_of_8_bits)
    return Machine(torch.cuda.get_device_name(device), bandwidth, peaks)


def _best_seconds(call: Callable[[], object]) -> float:
    call()
    found = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)


def _best_gpu_seconds(call: Callable[[], object]) -> float:
    call()
    found = []
    for _ in range(_ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1e-3)
    return min(found)
