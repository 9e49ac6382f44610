"""From a call that has begun to the response of its route: whole, or as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response

from dgemma_ext.serve import errors
from dgemma_ext.serve.call import Call
from dgemma_ext.serve.http import DONE, EventStream, client_gone, finished, json_answer, sent_event
from dgemma_ext.serve.routing import stated


class Reply:
    """The answers of a call in the form of an interface."""

    def whole(self) -> dict[str, Any]:
        raise NotImplementedError

    def events(self) -> AsyncIterator[bytes]:
        """The stream, as bytes of whole server-sent events."""
        raise NotImplementedError

    def failed(self, error: errors.ApiError) -> bytes:
        """The events that end a stream whose answer failed; the status is sent by then."""
        return sent_event(error.body) + DONE


class Asked(Protocol):
    stream: bool


async def respond(request: Request, call: Call, reply: Reply, body: Asked, prompt: Any) -> Response:
    """The response once the engine has taken the call, which is closed on every way out. prompt: for the log.

    Raises ApiError where the engine refuses it or an answer fails.
    """
    try:
        await call.accepted()
        stated(request, call, prompt)
        if body.stream:
            return EventStream(call, reply.events(), reply.failed)
        return json_answer(reply.whole()) if await finished(call, request) else client_gone()
    except BaseException:
        call.close()
        raise
