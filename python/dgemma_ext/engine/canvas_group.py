"""Requests whose denoising step is one pass: they join and leave between steps, and the batch stays dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from dgemma_ext.engine.loop import Device, DirectDevice, driver_for
from dgemma_ext.model.joint_pass import Pending
from dgemma_ext.sampling.canvas_batch import CanvasBatch, Told, bucket_of, make_canvas_batch
from dgemma_ext.sampling.sampler import CanvasState

if TYPE_CHECKING:
    from dgemma_ext.diffusion_gemma import DiffusionGemma
    from dgemma_ext.model.cache import Cache

Member = TypeVar("Member")

# make(model, cache, batch): where steps of the batch run.
MakeDevice = Callable[["DiffusionGemma", "Cache", CanvasBatch], Device]


@dataclass
class _Row:
    """What the host knows of a row without looking."""

    first_step: int
    next_step: int  # as far as the host has looked
    max_steps: int
    pending: Pending | None  # what its first step is to encode


class CanvasGroup(Generic[Member]):
    """Up to `capacity` members with canvases of one length. Rows 0 to n - 1 are in use, and a step runs over the next
    power of two.

    driver: of loop.DRIVERS. make_device: where steps run; called for every batch size when it is first met.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        cache: Cache,
        capacity: int,
        length: int,
        driver: str = "eager",
        make_device: MakeDevice = DirectDevice,
    ) -> None:
        self._model, self._cache = model, cache
        self._batch = make_canvas_batch(model, bucket_of(capacity), length)
        self._driver, self._make_device = driver, make_device
        self._devices: dict[int, Device] = {}
        self._members: list[Member] = []
        self._rows: list[_Row] = []

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._members)

    @property
    def pending(self) -> int:
        """How many tokens the next step is to encode."""
        return sum(one.ids.shape[1] for one in self._pending())

    def join(
        self,
        member: Member,
        canvas: CanvasState,
        slot: int,
        first_step: int,
        max_steps: int,
        pending: torch.Tensor | None = None,
    ) -> None:
        """Takes a canvas that is about to begin, over what the slot holds and `pending`, int [1, n]: tokens that its
        first step encodes. The numbers are those of the canvas, which the host need not ask the device for."""
        prefix = self._cache.length(slot) + (0 if pending is None else pending.shape[1])
        positions = torch.arange(prefix, prefix + self._batch.length, device=self._model.device)
        self._batch.load(len(self._members), canvas, slot, prefix, self._model.rotary_tables(positions))
        self._members.append(member)
        waiting = None if pending is None else Pending(slot, pending)
        self._rows.append(_Row(first_step, first_step, max_steps, waiting))

    def leave(self, member: Member) -> None:
        """Gives the member's row up; the last row takes its place. A member that is not here is none's concern."""
        if member not in self._members:
            return
        row, last = self._members.index(member), len(self._members) - 1
        if row != last:
            self._batch.move(last, row)
            self._members[row], self._rows[row] = self._members[last], self._rows[last]
        self._batch.clear(last)
        self._members.pop()
        self._rows.pop()

    def step(self) -> dict[Member, Progress]:
        """One denoising step of every member."""
        device = self._device()
        device.step(self._take_pending())
        return self._progress(device.look().wait())

    def run(self) -> dict[Member, Progress]:
        """Steps until a member's canvas is finished."""
        most = min(row.max_steps - row.next_step + 1 for row in self._rows)
        device = self._device()
        drive = driver_for(device, self._driver)
        return self._progress(drive(device, len(self._members), most, self._take_pending()))

    def _pending(self) -> list[Pending]:
        return [row.pending for row in self._rows if row.pending is not None]

    def _take_pending(self) -> list[Pending]:
        pending = self._pending()
        for row in self._rows:
            row.pending = None
        return pending

    def _device(self) -> Device:
        return self._device_of(bucket_of(len(self._members)))

    def _device_of(self, rows: int) -> Device:
        if rows not in self._devices:
            self._devices[rows] = self._make_device(self._model, self._cache, self._batch.first(rows))
        return self._devices[rows]

    def _progress(self, told: Told) -> dict[Member, Progress]:
        found = {}
        for index, (member, row) in enumerate(zip(self._members, self._rows, strict=True)):
            row.next_step = int(told.step[index])
            found[member] = Progress(told, index, row.next_step - row.first_step)
        return found


@dataclass(frozen=True)
class Progress:
    """How far a member's canvas is: a row of what the device told."""

    told: Told
    row: int
    steps: int  # made and counted; one that meets a number that is not finite is not
