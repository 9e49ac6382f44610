"""A call of an interface: one or more submissions to the engine, as a stream of what they give."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.engine import Commit, Draft, Failure
from dgemma_ext.serve import errors
from dgemma_ext.serve.answer import Answer, Piece
from dgemma_ext.serve.engine_thread import EngineThread
from dgemma_ext.serve.job_runner import Submission
from dgemma_ext.serve.mailbox import Accepted, JobEvent, Mailbox, Refused
from dgemma_ext.serve.metrics import Metrics

# Silence after which a stream gets a comment, so that nothing between server and client takes it for dead.
_SILENCE = 15.0


@dataclass(frozen=True)
class Silence:
    """Nothing has come for a while."""


Event = Draft | Piece | Silence


class Call:
    """Its submissions are queued when it is made; `close` gives their places back, and is needed on every way out.

    stops, one_call, middle: as in Answer. Raises ApiError where the submissions cannot be queued.
    """

    def __init__(
        self,
        engine: EngineThread,
        tokenizer: Tokenizer,
        metrics: Metrics,
        submissions: Sequence[Submission],
        timeout: float,
        stops: Sequence[str] = (),
        one_call: bool = False,
        middle: int | None = None,
    ) -> None:
        self.submissions = submissions
        self.answers = [Answer(tokenizer, one.prompt_ids, stops, one_call, middle) for one in submissions]
        self._engine, self._metrics = engine, metrics
        self._mailbox = Mailbox()
        self._began = time.monotonic()
        self._ends = self._began + timeout
        self._jobs = engine.enter(submissions, self._mailbox)

    def close(self) -> None:
        """Cancels what has not ended. It may be called again."""
        self._engine.leave(self._jobs)

    async def accepted(self) -> None:
        """Waits until the engine has taken all submissions; raises ApiError where it refuses one."""
        for _ in self._jobs:
            _, event = await self._next()
            _raise_failure(event)
            assert isinstance(event, Accepted)  # the submissions of a call are taken one after the other

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Drafts and pieces with the index of their answer, until all answers have ended, and silences with -1.

        Raises ApiError where an answer fails or takes too long.
        """
        open_answers = len(self.answers)
        while open_answers:
            found = await self._next(_SILENCE)
            if found is None:
                yield -1, Silence()
                continue
            index, event = found
            answer = self.answers[index]
            if answer.finish_reason is not None:
                continue  # a stop string has ended it, and what came after that was in the mailbox already
            _raise_failure(event)
            if isinstance(event, Draft):
                self._metrics.note_first_draft(self._jobs[index])
                yield index, event
            elif isinstance(event, Commit):
                piece = answer.commit(event)
                self._metrics.note_commit(self._jobs[index], event)
                if piece.finish_reason is not None:
                    self._engine.leave([self._jobs[index]])
                    self._metrics.note_answer(answer, time.monotonic() - self._began)
                    open_answers -= 1
                yield index, piece

    async def finish(self) -> None:
        """Waits for the end of all answers."""
        async for _ in self.events():
            pass

    async def _next(self, silence: float | None = None) -> Any:
        left = self._ends - time.monotonic()
        wait = left if silence is None else min(left, silence)
        try:
            index, event = await self._mailbox.get(max(0.0, wait))
        except TimeoutError:
            if silence is not None and time.monotonic() < self._ends:
                return None
            raise errors.unavailable("the answer has taken too long", "request_timeout") from None
        return index, event


def _raise_failure(event: JobEvent) -> None:
    if isinstance(event, Refused | Failure):
        raise errors.from_engine(event.error)
