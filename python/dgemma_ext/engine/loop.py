"""The loop over the steps of a canvas: three ways to drive the same steps, with the same tokens.

A finished row is frozen by the device itself (its `active` flag is cleared by the step that finishes it), so a step
that is queued too much changes nothing of it.

- `sync_loop`: the host waits for every step.
- `async_loop`: the next step is queued before the host reads the last one's output, so the device never waits for the
  host. Where a canvas finishes before its cap, one step too many is queued; for the other rows it is a step like any
  other. At a cap none is: the host knows the caps.
- `device_loop`: the device repeats the step by itself (on a GPU a WHILE node of a CUDA graph); the host reads once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dgemma_ext.engine.runner import StepRunner
from dgemma_ext.model import PrefillChunk
from dgemma_ext.sampling import StepOutput

# loop(runner, requests, max_steps, chunks): queues steps until one of the first `requests` rows, all active at the
# beginning, is finished; one is after `max_steps` steps, at least 1. The first step encodes the chunks. The result is
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
            return output  # frozen: the step that is still under way changes nothing
        if over.any():
            break
    return newest.wait()


def device_loop(runner: StepRunner, requests: int, max_steps: int, chunks: Sequence[PrefillChunk] = ()) -> StepOutput:
    if chunks:
        # By the host, for its shapes are its own. Should it finish a canvas, the device finds that one step late.
        runner.step(chunks)
        max_steps -= 1
    if max_steps:
        runner.run_until_finished(max_steps)
    return runner.copy_to_host().wait()


# By the names of Scheduler's option `driver`.
LOOPS: dict[str, Loop] = {"eager": sync_loop, "async": async_loop, "graph": device_loop}


def loop_for(runner: StepRunner, driver: str) -> Loop:
    """The loop of this name, or the next best where the runner does not repeat steps by itself."""
    return LOOPS["async" if driver == "graph" and not runner.repeats else driver]


def finished(output: StepOutput, requests: int) -> Tensor:
    """bool [requests]: whose canvas is done, for good or with a number that is not finite."""
    return output.status[:requests] != 0
