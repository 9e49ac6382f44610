"""Loops over the steps of a canvas. All three give the same tokens.

The step that finishes a row clears its `active` flag on the device, so further steps do not change the row.

- `sync_loop`: the host waits for every step.
- `async_loop`: the host queues the next step before it reads the last one's output, so the device never waits for the
  host. Where a canvas finishes before its cap, one more step is queued; other rows use it as any other step.
- `device_loop`: the device repeats the step by itself (on a GPU a WHILE node of a CUDA graph); the host reads once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dgemma_ext.engine.runner import StepRunner
from dgemma_ext.model import PrefillChunk
from dgemma_ext.sampling import StepOutput

# loop(runner, requests, max_steps, chunks): runs steps until one of the first `requests` rows is finished, at most
# `max_steps`, at least 1. All these rows are active at the beginning; the first step encodes the chunks. The result is
# from the finishing step or a later one.
Loop = Callable[[StepRunner, int, int, Sequence[PrefillChunk]], StepOutput]


def sync_loop(runner: StepRunner, requests: int, max_steps: int, chunks: Sequence[PrefillChunk] = ()) -> StepOutput:
    for step in range(max_steps):
        runner.step(() if step else chunks)
        output = runner.copy_to_host().wait()
        if finished(output, requests).any():
            break
    return output


def async_loop(runner: StepRunner, requests: int, max_steps: int, chunks: Sequence[PrefillChunk] = ()) -> StepOutput:
    runner.step(chunks)
    newest = runner.copy_to_host()
    for _ in range(max_steps - 1):
        runner.step()
        last, newest = newest, runner.copy_to_host()
        output = last.wait()
        over = finished(output, requests)
        if over.all():
            return output  # no row is active, so the step that is still queued changes nothing
        if over.any():
            break
    return newest.wait()


def device_loop(runner: StepRunner, requests: int, max_steps: int, chunks: Sequence[PrefillChunk] = ()) -> StepOutput:
    if chunks:
        # Not captured, because its shapes depend on the chunks. If it finishes a canvas, the loop runs one step more.
        runner.step(chunks)
        max_steps -= 1
    if max_steps:
        runner.run_until_finished(max_steps)
    return runner.copy_to_host().wait()


# The loops by the names of Scheduler's option `driver`.
LOOPS: dict[str, Loop] = {"eager": sync_loop, "async": async_loop, "graph": device_loop}


def loop_for(runner: StepRunner, driver: str) -> Loop:
    """The loop of this name; async_loop in place of device_loop where the runner cannot repeat steps by itself."""
    return LOOPS["async" if driver == "graph" and not runner.repeats else driver]


def finished(output: StepOutput, requests: int) -> Tensor:
    """bool [requests]: True for canvases that have finished or failed."""
    return output.status[:requests] != 0
