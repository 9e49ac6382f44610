"""The one thread that owns the scheduler.

Coroutines hand it jobs through a queue, and it hands events back to the event loop, all of a step at once. It never
waits for a client: what a slow one has not taken yet lies in that client's mailbox (mailbox.py).
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine import Commit, Draft, Failure, Request, Scheduler
from dgemma_ext.sampling import Canvas, SamplerConfig
from dgemma_ext.serve import errors
from dgemma_ext.serve.mailbox import Accepted, Mailbox, Refused
from dgemma_ext.serve.options import ServeOptions

logger = logging.getLogger("dgemma_ext.serve")

# After so many steps in a row that raised, no request can be served any more.
_MOST_BROKEN_STEPS = 8
# How much of the mean time of a request the newest one makes up.
_NEWEST = 0.1


@dataclass(frozen=True)
class Submission:
    """What a client asks the engine for: the arguments of Scheduler.submit, and whether it wants drafts."""

    prompt_ids: Sequence[int]
    max_new_tokens: int | None = None
    sampler: SamplerConfig | None = None
    seed: int = 0
    canvas: Canvas | None = None
    wants_drafts: bool = False


class Job:
    """A submission on its way. `index` tells a mailbox which of its jobs an event is of."""

    def __init__(self, submission: Submission, mailbox: Mailbox, index: int) -> None:
        self.submission = submission
        self.mailbox = mailbox
        self.index = index
        self.began = time.monotonic()
        self.has_first_draft = False
        self.is_left = False  # nobody waits for its events any more
        self.has_ended = False  # on the event loop: it holds no place in the queue
        self.request: Request | None = None  # the engine's thread alone uses it


class EngineThread:
    """Owns a scheduler. All methods are for the event loop; `start` tells which one that is.

    Attributes for everybody: `running` and `waiting`, how many requests have a slot and how many wait for one;
    `is_alive`, False after the thread has given up.
    """

    def __init__(self, model: DiffusionGemma, options: ServeOptions) -> None:
        self.scheduler = Scheduler(model, options.max_batch, options.max_length)
        self.capacity = options.max_batch + options.max_waiting
        self.max_batch = options.max_batch
        self.running = 0
        self.is_alive = True
        self._live: set[Job] = set()  # on the event loop
        self._mean_seconds = 1.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commands: queue.SimpleQueue[tuple[str, Sequence[Job]]] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}  # in the thread: the number of a request → its job
        self._outbox: list[tuple[Job, Any]] = []
        self._thread = threading.Thread(target=self._run, name="dgemma-engine", daemon=True)
        self._has_failures = False
        self._broken_steps = 0

    # On the event loop ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread; requests that are left are cancelled."""
        self.leave(list(self._live))
        self._commands.put(("stop", ()))
        await asyncio.to_thread(self._thread.join)

    @property
    def live(self) -> int:
        """How many jobs hold a slot or a place in the queue."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        return max(0, self.live - self.running)

    def enter(self, submissions: Sequence[Submission], mailbox: Mailbox) -> list[Job]:
        """Queues submissions together, or raises ApiError: 429 where they do not all fit, 503 for a dead engine."""
        if not self.is_alive:
            raise errors.unavailable("the engine has stopped; the server must be started again", "engine_stopped")
        if len(submissions) > self.capacity:
            raise errors.bad_request(f"n must be at most {self.capacity} here, got {len(submissions)}", "n")
        if len(self._live) + len(submissions) > self.capacity:
            raise errors.busy(self._retry_after())
        jobs = [Job(submission, mailbox, index) for index, submission in enumerate(submissions)]
        self._live.update(jobs)
        self._commands.put(("submit", jobs))
        return jobs

    def leave(self, jobs: Sequence[Job]) -> None:
        """Cancels those of the jobs that have not ended; their slots are free after the step that is under way."""
        leaving = [job for job in jobs if not job.has_ended and not job.is_left]
        for job in leaving:
            job.is_left = True
        if leaving:
            self._commands.put(("cancel", leaving))

    def _retry_after(self) -> int:
        """Seconds until a request of the usual length will have ended for each that waits."""
        return min(60, max(1, math.ceil(self._mean_seconds * len(self._live) / self.max_batch)))

    def _deliver(self, events: list[tuple[Job, Any]]) -> None:
        for job, event in events:
            if event is _LEFT or isinstance(event, Refused | Failure) or _is_last(event):
                self._note_end(job, completed=_is_last(event))
            if not job.is_left:
                job.mailbox.put(job.index, event)

    def _note_end(self, job: Job, completed: bool) -> None:
        job.has_ended = True
        self._live.discard(job)
        if completed:
            self._mean_seconds += _NEWEST * (time.monotonic() - job.began - self._mean_seconds)

    # In the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._advance()
                self._flush()
        except BaseException as error:
            self._give_up(error)

    def _take_commands(self) -> bool:
        """Carries out what has been asked for, and waits for more where there is nothing to step. False is the end."""
        while True:
            is_idle = not self._has_failures and self.scheduler.idle
            try:
                command, jobs = self._commands.get(block=is_idle)
            except queue.Empty:
                return True
            if command == "stop":
                return False
            for job in jobs:
                if command == "submit":
                    self._submit(job)
                else:
                    self._cancel(job)
            if self._commands.empty():
                self._flush()

    def _submit(self, job: Job) -> None:
        if job.is_left:
            return  # the command that cancels it comes next
        asked = job.submission
        try:
            job.request = self.scheduler.submit(
                list(asked.prompt_ids), asked.max_new_tokens, asked.sampler, asked.seed, asked.canvas
            )
        except Exception as error:
            if not isinstance(error, ValueError | MemoryError):
                logger.exception("a request could not be queued")
            self._outbox.append((job, Refused(error)))
            return
        self._jobs[job.request.number] = job
        self._outbox.append((job, Accepted(len(asked.prompt_ids), job.request.max_new_tokens)))

    def _cancel(self, job: Job) -> None:
        if job.request is not None:
            job.request.cancel()
            self._jobs.pop(job.request.number, None)
        self._outbox.append((job, _LEFT))
        self.running = self.max_batch - self.scheduler.free_slots

    def _advance(self) -> None:
        self._has_failures = False
        try:
            events = self.scheduler.step()
        except Exception:
            # The requests of the step have failed, and the next call tells so; the others go on.
            logger.exception("a step was broken off")
            self._has_failures = True
            self._broken_steps += 1
            if self._broken_steps >= _MOST_BROKEN_STEPS:
                raise
            return
        self._broken_steps = 0
        for event in events:
            job = self._jobs.get(event.request.number)
            if job is None:
                continue
            if isinstance(event, Failure) or _is_last(event):
                del self._jobs[event.request.number]
            if job.submission.wants_drafts or not isinstance(event, Draft):
                self._outbox.append((job, event))
        self.running = self.max_batch - self.scheduler.free_slots

    def _flush(self) -> None:
        if self._outbox and self._loop is not None:
            events, self._outbox = self._outbox, []
            try:
                self._loop.call_soon_threadsafe(self._deliver, events)
            except RuntimeError:  # the loop was closed before the thread was stopped
                logger.debug("events of a closed loop are dropped")

    def _give_up(self, error: BaseException) -> None:
        logger.critical("the engine stops: %r", error)
        self.is_alive = False
        stopped = errors.unavailable("the engine has stopped; the server must be started again", "engine_stopped")
        self._outbox += [(job, Refused(stopped)) for job in self._jobs.values()]
        self._jobs.clear()
        self._flush()
        while True:  # whoever came in the meantime
            command, jobs = self._commands.get()
            if command == "stop":
                return
            self._outbox += [(job, Refused(stopped) if command == "submit" else _LEFT) for job in jobs]
            self._flush()


class _Left:
    """The event of a job that was cancelled."""


_LEFT = _Left()


def _is_last(event: Any) -> bool:
    return isinstance(event, Commit) and event.finish_reason is not None
