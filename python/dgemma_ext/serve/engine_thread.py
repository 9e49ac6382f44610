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
from typing import Any

from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine import Commit, Failure, Scheduler
from dgemma_ext.serve import errors
from dgemma_ext.serve.job_runner import Job, JobRunner, Submission
from dgemma_ext.serve.mailbox import Left, Mailbox, Refused
from dgemma_ext.serve.options import ServeOptions

logger = logging.getLogger("dgemma_ext.serve")

# How much of the mean time of a request the newest one makes up.
_NEWEST = 0.1


class EngineThread:
    """Owns a scheduler. All methods are for the event loop; `start` tells which one that is.

    `is_alive` turns False when the thread gives up: then steps break off whatever runs.
    """

    def __init__(self, model: DiffusionGemma, options: ServeOptions) -> None:
        self.scheduler = Scheduler(
            model, options.max_batch, options.max_length, prefix_cache_bytes=options.prefix_cache_bytes
        )
        self.capacity = options.max_batch + options.max_waiting
        self.max_batch = options.max_batch
        self._runner = JobRunner(self.scheduler)
        self.is_alive = True
        self._live: set[Job] = set()  # on the event loop
        self._mean_seconds = 1.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commands: queue.SimpleQueue[tuple[str, Sequence[Job]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # On the event loop ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="dgemma-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread; requests that are left are cancelled. The engine may be started again."""
        self.leave(list(self._live))
        self._commands.put(("stop", ()))
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    @property
    def live(self) -> int:
        """How many jobs hold a slot or a place in the queue."""
        return len(self._live)

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return self._runner.running

    @property
    def waiting(self) -> int:
        return max(0, self.live - self.running)

    def check_count(self, prompts: int, choices: int) -> None:
        """Raises ApiError for more answers than there are places, before anything is made for them."""
        if prompts > self.capacity:
            raise errors.bad_request(f"prompt may have {self.capacity} prompts at most here, got {prompts}", "prompt")
        if prompts * choices > self.capacity:
            count = f"{choices}" if prompts == 1 else f"{choices} for each of {prompts} prompts"
            raise errors.bad_request(f"n must be at most {self.capacity // prompts} here, got {count}", "n")

    def enter(self, submissions: Sequence[Submission], mailbox: Mailbox) -> list[Job]:
        """Queues submissions together, or raises ApiError: 429 where they do not all fit, 503 for a dead engine."""
        if not self.is_alive:
            raise _stopped()
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
            is_last = isinstance(event, Commit) and event.finish_reason is not None
            if is_last or isinstance(event, Left | Refused | Failure):
                self._note_end(job, completed=is_last)
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
                self._runner.advance()
                self._flush()
        except BaseException as error:
            self._give_up(error)

    def _take_commands(self) -> bool:
        """Carries out what has been asked for, and waits for more where there is nothing to step. False is the end."""
        while True:
            try:
                command, jobs = self._commands.get(block=self._runner.is_idle)
            except queue.Empty:
                return True
            if command == "stop":
                return False
            for job in jobs:
                if command == "submit":
                    self._runner.submit(job)
                else:
                    self._runner.cancel(job)
            if self._commands.empty():
                self._flush()

    def _flush(self) -> None:
        events = self._runner.take_events()
        if events and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._deliver, events)
            except RuntimeError:  # the loop was closed before the thread was stopped
                logger.debug("events of a closed loop are dropped")

    def _give_up(self, error: BaseException) -> None:
        logger.critical("the engine stops: %r", error)
        self.is_alive = False
        self._runner.give_up(_stopped())
        self._flush()
        while True:  # whoever came in the meantime
            command, jobs = self._commands.get()
            if command == "stop":
                return
            self._runner.refuse(jobs, _stopped())
            self._flush()


def _stopped() -> errors.ApiError:
    return errors.unavailable("the engine has stopped; the server must be started again", "engine_stopped")
