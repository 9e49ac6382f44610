"""Answers over HTTP that end early where the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dgemma_ext.serve import errors
from dgemma_ext.serve.call import Call

DONE = b"data: [DONE]\n\n"
COMMENT = b": the answer is on its way\n\n"


def json_bytes(data: Any) -> bytes:
    """JSON in UTF-8. Half of a surrogate pair, which a client may have sent as an escape, is told as one again."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace")


def sent_event(data: Any, name: str | None = None) -> bytes:
    """A server-sent event with JSON as its data."""
    head = "" if name is None else f"event: {name}\n"
    return head.encode() + b"data: " + json_bytes(data) + b"\n\n"


class EventStream(Response):
    """Server-sent events of a call, which is closed at their end, an error's or the client's.

    events: bytes of whole events. An error after the first one is an event itself, because the status is sent by then;
    failure: makes it.
    """

    media_type = "text/event-stream"

    def __init__(self, call: Call, events: AsyncIterator[bytes], failure: Callable[[errors.ApiError], bytes]) -> None:
        self.call = call
        self.events = events
        self.failure = failure
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send(send))
        finally:
            self.call.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self.events) as events:  # type: ignore[type-var]
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except errors.ApiError as error:
                await send({"type": "http.response.body", "body": self.failure(error), "more_body": True})
            except Exception:  # which the log gets from whoever called this
                failed = self.failure(errors.internal_error())
                await send({"type": "http.response.body", "body": failed, "more_body": False})
                raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_gone(receive: Receive, work: Awaitable[Any]) -> bool:
    """Does the work until it is done or the client has left; returns whether it was done. Raises what it raises."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def finished(call: Call, request: Request) -> bool:
    """Waits for the answers of a call and closes it; returns False where the client has left before."""
    try:
        return await until_gone(request.receive, call.finish())
    finally:
        call.close()


def client_gone() -> Response:
    """For a client that will not read it; the status stands in the log alone."""
    return Response(status_code=499)


def json_answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(content), status, headers, media_type="application/json")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
