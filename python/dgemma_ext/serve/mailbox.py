"""Where events wait for the coroutine that answers a client."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from dgemma_ext.engine import Commit, Draft, Failure

# Drafts that a client has not taken; older ones are dropped, because each shows the whole canvas.
_MOST_DRAFTS = 8


@dataclass(frozen=True)
class Accepted:
    """The scheduler has queued a job."""

    prompt_tokens: int
    max_new_tokens: int


@dataclass(frozen=True)
class Refused:
    """A job has ended before it began, or with the engine."""

    error: BaseException


@dataclass(frozen=True)
class Left:
    """A job that was cancelled has ended; nobody takes this out of a mailbox."""


JobEvent = Accepted | Refused | Draft | Commit | Failure


class Mailbox:
    """The events of a call's jobs in their order, each with its job's index. Only the event loop uses it.

    Of drafts it keeps the newest few, of other events all: there are as many as canvases.
    """

    def __init__(self) -> None:
        self._events: deque[tuple[int, JobEvent]] = deque()
        self._drafts = 0
        self._arrived = asyncio.Event()

    def put(self, index: int, event: JobEvent) -> None:
        if isinstance(event, Draft):
            if self._drafts == _MOST_DRAFTS:
                oldest = next(place for place, (_, kept) in enumerate(self._events) if isinstance(kept, Draft))
                del self._events[oldest]
            else:
                self._drafts += 1
        self._events.append((index, event))
        self._arrived.set()

    async def get(self, seconds: float) -> tuple[int, JobEvent]:
        """The next event. Raises TimeoutError where none comes within so many seconds."""
        if not self._events:
            async with asyncio.timeout(seconds):
                while not self._events:
                    self._arrived.clear()
                    await self._arrived.wait()
        index, event = self._events.popleft()
        if isinstance(event, Draft):
            self._drafts -= 1
        return index, event
