"""A loop that is asked for a whole canvas: it queues steps of a batch until a canvas of it is finished.

Three ways to drive the same steps, with the same tokens. The device freezes a finished row by itself (its `active` flag
is cleared by the step that finishes it), so a step that is queued too much changes nothing of it.

- `step_then_look`: the host waits for every step.
- `one_step_late`: the next step is queued before the host looks at the last one's flags, so the device never waits for
  the host. Where a canvas finishes before its cap, one step too many is queued; for the other rows it is a step like
  any other. At a cap none is: the host knows the caps.
- `until_finished`: the device repeats the step by itself (on a GPU a WHILE node of a CUDA graph), the host looks once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from dgemma_ext.sampling.batch_step import batch_step
from dgemma_ext.sampling.canvas_batch import CanvasBatch, Told, told_bytes

if TYPE_CHECKING:
    from dgemma_ext.diffusion_gemma import DiffusionGemma
    from dgemma_ext.model.cache import Cache
    from dgemma_ext.model.joint_pass import Pending


class Look(Protocol):
    """What the steps queued so far will have left, once they are done."""

    def wait(self) -> Told:
        """Blocks until it is there, on the host."""
        ...


class Device(Protocol):
    """Where the steps of a batch run, in the order in which they are queued.

    repeats: whether it has `until_finished`.
    """

    repeats: bool

    def step(self, pending: Sequence[Pending] = ()) -> None:
        """Queues one step; `pending`: tokens that it encodes for its rows to see."""
        ...

    def look(self) -> Look:
        """Queues a copy of what the host wants to know. Good until the second look after it."""
        ...

    def until_finished(self, most: int) -> None:
        """Queues steps that end by themselves: when a row with a request is not active any more, or after `most`."""
        ...


# driver(device, members, most, pending): queues steps until one of the first `members` rows, all active at the
# beginning, is finished; after `most` steps, at least 1, one is. The first encodes what is pending. What it gives back
# has been read after the step that finished the row, or later.
Driver = Callable[[Device, int, int, Sequence["Pending"]], Told]


def step_then_look(device: Device, members: int, most: int, pending: Sequence[Pending] = ()) -> Told:
    for step in range(most):
        device.step(() if step else pending)
        told = device.look().wait()
        if finished(told, members).any():
            break
    return told


def one_step_late(device: Device, members: int, most: int, pending: Sequence[Pending] = ()) -> Told:
    device.step(pending)
    newest = device.look()
    for _ in range(most - 1):
        device.step()
        late, newest = newest, device.look()
        told = late.wait()
        over = finished(told, members)
        if over.all():
            return told  # frozen: the step that is still under way changes nothing
        if over.any():
            break
    return newest.wait()


def until_finished(device: Device, members: int, most: int, pending: Sequence[Pending] = ()) -> Told:
    if pending:
        # By the host, for its shapes are its own. Should it finish a canvas, the device finds that one step late.
        device.step(pending)
        most -= 1
    if most:
        device.until_finished(most)
    return device.look().wait()


DRIVERS: dict[str, Driver] = {"eager": step_then_look, "late": one_step_late, "graph": until_finished}


def driver_for(device: Device, wanted: str) -> Driver:
    """The driver of this name, or the next best where the device does not repeat steps by itself."""
    return DRIVERS["late" if wanted == "graph" and not device.repeats else wanted]


def finished(told: Told, members: int) -> torch.Tensor:
    """bool [members]: whose canvas is done, for good or with a number that is not finite."""
    return told.status[:members] != 0


class DirectDevice:
    """Runs every step as it is called, operator by operator."""

    repeats = True

    def __init__(self, model: DiffusionGemma, cache: Cache, batch: CanvasBatch) -> None:
        self._model, self._cache, self._batch = model, cache, batch

    def step(self, pending: Sequence[Pending] = ()) -> None:
        batch_step(self._model, self._cache, self._batch, pending)

    def look(self) -> Look:
        return _Copied(self._batch)

    def until_finished(self, most: int) -> None:
        """What loop_condition_kernel (csrc/cuda/graph_loop.cu) decides after every step, here on the host."""
        for _ in range(most):
            self.step()
            if bool(((self._batch.slot >= 0) & ~self._batch.state.active).any()):
                return


class _Copied:
    """A look that is over: the copy waits for the device."""

    def __init__(self, batch: CanvasBatch) -> None:
        rows = batch.told.numel() // told_bytes(1, batch.length)
        self._told = Told.over(batch.told.to("cpu", copy=True), rows, batch.length)

    def wait(self) -> Told:
        return self._told
