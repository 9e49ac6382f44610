"""The groups of a scheduler: one for each length of a canvas that its requests have."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dgemma_ext.engine.cuda_graphs import CudaEagerRunner, can_capture, cuda_runner
from dgemma_ext.engine.group import CanvasGroup, MakeRunner, bucket_of
from dgemma_ext.engine.memory import MemoryPlan, batch_plan, check_memory
from dgemma_ext.engine.request import Request
from dgemma_ext.engine.runner import EagerRunner
from dgemma_ext.model import Cache, Network
from dgemma_ext.model.vision import Vision


class CanvasGroups(dict[int, CanvasGroup[Request]]):
    """Canvas length → group. That of the checkpoint's canvas length always exists; another is made for the first
    request that may have canvases of its length, and given up where a request wants one more and none has that length.

    batched, driver, make_runner: as the Scheduler takes them, make_runner None for that of the device.
    """

    def __init__(
        self, network: Network, max_batch: int, batched: bool, driver: str, make_runner: MakeRunner | None
    ) -> None:
        super().__init__()
        self._network, self._max_batch, self._batched, self._driver = network, max_batch, batched, driver
        self._make_runner = make_runner or _runner_maker(network.device, driver, batched)
        self._cache: Cache | None = None

    def begin(self, cache: Cache) -> None:
        """Makes the group of the checkpoint's canvas length over the scheduler's cache."""
        self._cache = cache
        length = self._network.config.canvas_length
        self[length] = self._new_group(length)
        if self._make_runner is cuda_runner:
            # A capture makes all other work on the GPU wait, so none of the usual length falls into later steps.
            self[length].make_runners()

    def make_for(self, request: Request, others: Iterable[Request], vision: Vision | None) -> None:
        """Makes the groups for a request's canvas lengths, after giving up those of lengths that no request has.

        others: the requests that run or wait. Raises dg.NotEnoughMemory where the buffers of a group do not fit.
        """
        missing = request.canvas_lengths - self.keys()
        if not missing or self._cache is None:
            return
        wanted = {self._network.config.canvas_length}.union(*(one.canvas_lengths for one in (*others, request)))
        for length in self.keys() - wanted:
            del self[length]
        for length in missing:
            self.check_memory(length, self._cache.max_length, vision)
            self[length] = self._new_group(length)

    def check_memory(self, length: int, positions: int, vision: Vision | None, slots: int = 0, kept: int = 0) -> None:
        """Raises dg.NotEnoughMemory where a group's buffers do not fit, with a cache of `slots` for `positions` each
        and `kept` bytes of a prefix cache."""
        if self._batched:
            captured = self._make_runner is cuda_runner and can_capture(self._network)
            requests = bucket_of(self._max_batch)
            tower = None if vision is None else vision.tower.config
            plan = batch_plan(self._network, requests, length, positions, slots, captured, kept, tower)
        else:
            # There are buffers for one canvas only, and unused pages of the cache take no memory.
            plan = MemoryPlan({}, 0, 0, 0, positions, self._max_batch, prefix_cache=kept)
        check_memory(plan, 0, self._network.device)

    def _new_group(self, length: int) -> CanvasGroup[Request]:
        assert self._cache is not None, "begin comes first"
        return CanvasGroup(
            self._network, self._cache, self._max_batch, length, self._batched, self._driver, self._make_runner
        )


def _runner_maker(device: torch.device, driver: str, batched: bool) -> MakeRunner:
    if device.type != "cuda" or not batched:
        return EagerRunner
    return CudaEagerRunner if driver == "eager" else cuda_runner
