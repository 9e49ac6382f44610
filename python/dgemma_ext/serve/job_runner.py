"""Runs jobs on the scheduler, all in one thread: submits them, steps, and tells their events.

A step that breaks off (memory that ran out, an error of a kernel) ends every request that shared it. Those are run
again, one at a time, from their beginning, which gives the same tokens: what the client has already got is left out,
and a job whose step breaks off while it runs alone is the one to blame and fails.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dgemma_ext.engine import Commit, Draft, Failure, Request, Scheduler, TokenizedPrompt
from dgemma_ext.errors import NonFiniteError
from dgemma_ext.sampling import Canvas, Grammar, SamplerConfig
from dgemma_ext.serve.mailbox import Accepted, Left, Mailbox, Refused

logger = logging.getLogger("dgemma_ext.serve")


@dataclass(frozen=True)
class Submission:
    """What a client asks the engine for: the arguments of Scheduler.submit, and whether it wants drafts.

    deadline: seconds from when its job is made.
    """

    prompt: TokenizedPrompt
    max_new_tokens: int | None = None
    sampler: SamplerConfig | None = None
    seed: int = 0
    canvas: Canvas | None = None
    wants_drafts: bool = False
    logprobs: int | None = None
    deadline: float | None = None
    grammar: Grammar | None = None
    logprob_token_ids: Sequence[int] | None = None
    adapter: str | None = None

    @property
    def prompt_ids(self) -> list[int]:
        return self.prompt.ids


class Job:
    """A submission on its way. `index` tells a mailbox which of its jobs an event is of."""

    def __init__(self, submission: Submission, mailbox: Mailbox, index: int) -> None:
        self.submission = submission
        self.mailbox = mailbox
        self.index = index
        self.began = time.monotonic()
        # The event loop's:
        self.has_first_draft = False
        self.is_left = False  # nobody waits for its events any more; the runner reads it too
        self.has_ended = False  # it holds no place in the queue
        # The runner's:
        self.request: Request | None = None
        self.commits = 0  # that have been told


class JobRunner:
    """The scheduler's jobs. `running`: how many have a slot; other threads may read it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.running = 0
        self._events: list[tuple[Job, Any]] = []
        self._jobs: dict[int, Job] = {}  # the number of a request → its job
        self._suspects: deque[Job] = deque()  # to be run alone
        self._held: deque[Job] = deque()  # that wait until there is no suspect
        self._alone: Job | None = None
        self._untold = 0  # requests that steps have ended by breaking off; the next one that does not tells it

    @property
    def is_idle(self) -> bool:
        return not self._untold and not self._suspects and not self._held and self.scheduler.idle

    def take_events(self) -> list[tuple[Job, Any]]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def submit(self, job: Job) -> None:
        """Queues a job. Its first event is Accepted, or the Refused that ends it."""
        if job.is_left:
            return  # its cancelling comes next
        if self._suspects or self._alone is not None:
            self._held.append(job)
        else:
            self._begin(job)

    def cancel(self, job: Job) -> None:
        """Ends a job wherever it is; its last event is Left."""
        for waiting in (self._suspects, self._held):
            if job in waiting:
                waiting.remove(job)
        if job.request is not None:
            job.request.cancel()
            self._jobs.pop(job.request.number, None)
        self._ended(job)
        self._events.append((job, Left()))

    def advance(self) -> None:
        """Runs a step. Raises what breaks all steps off from now on: an error of a device that does not answer any
        more, or one that no request is to blame for."""
        self._next_suspect()
        try:
            events = self.scheduler.step()
        except Exception:
            logger.exception("a step was broken off")
            ended = sum(job.request is not None and job.request.done for job in self._jobs.values())
            if ended == self._untold or not answers(self.scheduler.network.device):
                raise
            self._untold = ended
            return
        self._untold = 0
        broken = [
            event for event in events if isinstance(event, Failure) and not isinstance(event.error, NonFiniteError)
        ]
        for event in events:
            job = self._jobs.get(event.request.number)
            if job is not None:
                self._tell(job, event, is_shared=len(broken) > 1)
        self.running = self.scheduler.max_batch - self.scheduler.free_slots

    def give_up(self, error: BaseException) -> None:
        """Ends all jobs with an error."""
        self._events += [(job, Refused(error)) for job in (*self._jobs.values(), *self._suspects, *self._held)]
        self._jobs.clear()
        self._suspects.clear()
        self._held.clear()

    def refuse(self, jobs: Sequence[Job], error: BaseException) -> None:
        """Ends jobs that have not begun."""
        self._events += [(job, Refused(error)) for job in jobs]

    def _begin(self, job: Job) -> None:
        asked = job.submission
        is_first = job.request is None
        try:
            job.request = self.scheduler.submit(
                asked.prompt,
                asked.max_new_tokens,
                asked.sampler,
                asked.seed,
                asked.canvas,
                logprobs=asked.logprobs,
                deadline=None if asked.deadline is None else max(0.0, job.began + asked.deadline - time.monotonic()),
                grammar=asked.grammar,
                logprob_token_ids=asked.logprob_token_ids,
                adapter=asked.adapter,
            )
        except Exception as error:
            if not isinstance(error, ValueError | MemoryError):
                logger.exception("a request could not be queued")
            self._ended(job)
            self._events.append((job, Refused(error)))
            return
        self._jobs[job.request.number] = job
        if is_first:
            self._events.append((job, Accepted(len(asked.prompt_ids), job.request.max_new_tokens)))

    def _tell(self, job: Job, event: Any, is_shared: bool) -> None:
        """Passes an event on, unless the client has it or the job gets another try."""
        if isinstance(event, Failure):
            del self._jobs[event.request.number]
            if is_shared and job is not self._alone and not isinstance(event.error, NonFiniteError):
                self._suspects.append(job)
                return
            self._ended(job)
        elif event.canvas_index < job.commits:
            return  # of a job that runs again
        elif isinstance(event, Draft) and not job.submission.wants_drafts:
            return
        elif isinstance(event, Commit):
            job.commits += 1
            if event.finish_reason is not None:
                del self._jobs[event.request.number]
                self._ended(job)
        self._events.append((job, event))

    def _ended(self, job: Job) -> None:
        if job is self._alone:
            self._alone = None
        self.running = self.scheduler.max_batch - self.scheduler.free_slots

    def _next_suspect(self) -> None:
        """Begins a suspect where nothing else runs, or, when there are none left, what was held back."""
        if self._alone is None and self._suspects and self.scheduler.idle:
            self._alone = self._suspects.popleft()
            self._begin(self._alone)
        while self._held and self._alone is None and not self._suspects:
            self._begin(self._held.popleft())


def answers(device: torch.device) -> bool:
    """Whether a device still computes. After some errors CUDA refuses every call until the process ends."""
    try:
        return bool(torch.ones(1, dtype=torch.float32, device=device).item())
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
