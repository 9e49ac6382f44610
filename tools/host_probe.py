"""Tries what the loop of a canvas rests on, piece by piece, on a GPU and without a model.

    python tools/host_probe.py                 every piece, each in a process of its own with a limit of 20 s
    python tools/host_probe.py capture times   these pieces, here
    python tools/host_probe.py --list          the names

It needs the built package. A line for each piece: PASS, FAIL or HANG, and what it said. Exits with 1 when one fails,
with 2 where no GPU is visible to torch.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SECONDS = 20
Step = Callable[[], object]
# What each returns is said of it.
Piece = Callable[[], str | None]
PIECES: dict[str, Piece] = {}


def piece(function: Piece) -> Piece:
    PIECES[function.__name__] = function
    return function


# What the pieces are made of ------------------------------------------------------------------------------------------


def captured(step: Step, pool: Any = None) -> Any:
    """The step as a graph, by torch's own means."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    graph.instantiate()
    return graph


@dataclass
class Loop:
    """A captured step that the device repeats, and a counter of its repetitions."""

    graph: Any
    made: Any
    left: Any
    flags: tuple[Any, Any]
    whole: Any

    @classmethod
    def of(cls, step: Step, pool: Any = None) -> Loop:
        import torch

        from dgemma_ext import _C

        made, left, slot = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(3))
        active = torch.ones(1, dtype=torch.bool, device="cuda")

        def counted() -> None:
            step()
            made.add_(1)

        graph = captured(counted, pool)
        whole = _C.GraphLoop(graph.raw_cuda_graph(), active.data_ptr(), slot.data_ptr(), 1, left.data_ptr())
        return cls(graph, made, left, (active, slot), whole)

    def launch(self, times: int) -> None:
        import torch

        self.left.fill_(times)
        self.whole.launch(torch.cuda.current_stream().cuda_stream)

    def check(self, times: int) -> None:
        self.made.zero_()
        self.launch(times)
        assert int(self.made) == times, f"the device made {int(self.made)} repetitions, wanted {times}"


def products() -> tuple[Step, Any]:
    """Two products by cuBLAS, and the tensor that they write."""
    import torch
    from torch.nn import functional

    x = torch.randn(256, 2816, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(4096, 2816, device="cuda", dtype=torch.bfloat16) * 2816**-0.5
    v = torch.randn(2816, 4096, device="cuda", dtype=torch.bfloat16) * 4096**-0.5
    out = torch.empty_like(x)
    return lambda: torch.mm(functional.linear(x, w), v.t(), out=out), out


def operators() -> tuple[Step, Any]:
    """Products by cuBLAS and operators of this library, whose kernels may begin before those in front of them end."""
    import torch
    from torch.nn import functional

    from dgemma_ext.ops import layer

    x = torch.randn(256, 2816, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(2112, 2816, device="cuda", dtype=torch.bfloat16) * 2816**-0.5
    v = torch.randn(2816, 2112, device="cuda", dtype=torch.bfloat16) * 2112**-0.5
    out, ones = torch.empty_like(x), torch.ones(2816, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        product = layer.gelu_product(functional.linear(x, w), functional.linear(x, w))
        summed, first, second = layer.attention_residual(x, functional.linear(product, v), ones, ones, ones, 1e-6)
        out.copy_(layer.layer_output(summed, first, second, ones, ones, ones, ones, 1.0, 1e-6)[0])

    return step, out


# Pieces ---------------------------------------------------------------------------------------------------------------


@piece
def capture() -> None:
    """A captured product by cuBLAS gives what it gives uncaptured."""
    import torch

    step, out = products()
    step()
    wanted = out.clone()
    graph = captured(step)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


@piece
def child_in_while() -> None:
    """A captured step as the child of a WHILE node."""
    Loop.of(products()[0]).check(7)


@piece
def set_and_copy_in_while() -> None:
    """Memory nodes in the body."""
    import torch

    source, target = torch.ones(1000, device="cuda"), torch.empty(1000, device="cuda")
    loop = Loop.of(lambda: (target.zero_(), target.copy_(source)))
    loop.check(5)
    assert bool((target == 1).all())


@piece
def pdl_in_while() -> None:
    """Programmatic dependent launches in the body. Where this alone fails, try DGEMMA_PDL=0."""
    import torch

    step, out = operators()
    step()
    wanted = out.clone()
    loop = Loop.of(step)
    out.zero_()
    loop.check(7)
    assert torch.equal(out, wanted)


@piece
def two_sizes() -> None:
    """Two loops over one pool of memory, launched by turns."""
    import torch

    pool = torch.cuda.graph_pool_handle()
    step, _ = products()
    loops = [Loop.of(step, pool), Loop.of(operators()[0], pool)]
    for times in (3, 5):
        for loop in loops:
            loop.check(times)


@piece
def recapture() -> None:
    """By torch alone: a capture into a pool whose graphs are gone. torch 2.11 is thought to refuse the second one."""
    import torch

    pool = torch.cuda.graph_pool_handle()
    step, _ = products()
    graph = captured(step, pool)
    del graph
    captured(step, pool)


@piece
def recapture_by_the_engine() -> None:
    """The same with the engine's place for captures, which keeps the pool."""
    import torch

    from dgemma_ext.engine import cuda_graphs

    device = torch.device("cuda", torch.cuda.current_device())
    place = cuda_graphs._capture_place(device)
    step, _ = products()
    for _ in range(3):
        with torch.cuda.stream(place.warm_up):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with cuda_graphs._capturing(place, graph):
            step()
        graph.instantiate()
        graph.replay()
        torch.cuda.synchronize()
        del graph


@piece
def failed_capture() -> None:
    """After a capture that failed the thread's stream is as before, memory is freed, and another capture works."""
    import torch

    from dgemma_ext.engine import cuda_graphs

    device = torch.device("cuda", torch.cuda.current_device())
    place, before = cuda_graphs._capture_place(device), torch.cuda.current_stream()
    step, out = products()
    step()
    torch.cuda.synchronize()
    refused = False
    try:
        with cuda_graphs._capturing(place, torch.cuda.CUDAGraph()):
            float(out.sum())  # waits, which a capture does not allow
    except RuntimeError:
        refused = True
    assert refused, "a wait was captured"
    assert torch.cuda.current_stream() == before, "the capture's stream stays the current one"
    big = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    reserved = torch.cuda.memory_reserved()
    del big
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved, "empty_cache frees nothing"
    recapture_by_the_engine()


@piece
def other_thread() -> None:
    """Captures while another thread allocates on the device and pins memory."""
    import torch

    stop, failures = threading.Event(), list[BaseException]()

    def allocate() -> None:
        try:
            while not stop.is_set():
                torch.empty(64 << 20, dtype=torch.uint8, device="cuda").zero_()
                torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        pool, kept = torch.cuda.graph_pool_handle(), []
        for times in range(2, 6):
            kept.append(Loop.of(products()[0], pool))
            kept[-1].check(times)
    finally:
        stop.set()
        thread.join()
    assert not failures, failures


@piece
def no_waits() -> None:
    """A launch of the loop waits for nothing."""
    import torch

    loop = Loop.of(products()[0])
    loop.check(2)
    torch.cuda.set_sync_debug_mode("error")
    loop.launch(3)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@piece
def times() -> str:
    """What a repetition costs: by the device's loop, by replays, launch by launch. Run with nothing beside it."""
    import torch

    repetitions = 100
    step, _ = operators()
    loop = Loop.of(step)

    def microseconds(go: Step) -> float:
        best = float("inf")
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            go()
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        return best * 1e6 / repetitions

    found = {
        "loop": microseconds(lambda: loop.launch(repetitions)),
        "replays": microseconds(lambda: [loop.graph.replay() for _ in range(repetitions)]),
        "launches": microseconds(lambda: [step() for _ in range(repetitions)]),
    }
    return ", ".join(f"{name} {value:.2f}" for name, value in found.items()) + " us a step"


# Running them ---------------------------------------------------------------------------------------------------------


def run_apart(name: str) -> tuple[str, str]:
    """Runs a piece in a process of its own; the verdict and its last words."""
    try:
        command = [sys.executable, __file__, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "HANG", f"not ended after {SECONDS} s"
    words = (done.stdout if done.returncode == 0 else done.stdout + done.stderr).strip().splitlines()
    return ("PASS" if done.returncode == 0 else "FAIL"), (words[-1][:300] if words else f"status {done.returncode}")


def main(arguments: list[str]) -> int:
    if arguments == ["--list"]:
        print("\n".join(PIECES))
        return 0
    if not set(arguments) <= set(PIECES):
        print(__doc__, file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("host_probe: no GPU is visible to torch")
        return 2
    if arguments:
        for name in arguments:
            said = PIECES[name]()
            torch.cuda.synchronize()
            print(f"{name}: {said or 'done'}", flush=True)
        return 0
    failed = False
    for name in PIECES:
        verdict, words = run_apart(name)
        failed |= verdict != "PASS"
        print(f"{verdict} {words if words.startswith(name) else f'{name}: {words}'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
