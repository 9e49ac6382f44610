"""One line of JSON for every request, on stderr: who asked what, how it ended, how long it took.

No line holds a key. Prompts and answers are in it with the option log_prompts alone.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
import traceback
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma_ext.serve import errors
from dgemma_ext.serve.call import Call
from dgemma_ext.serve.http import json_answer
from dgemma_ext.serve.service import Service

logger = logging.getLogger("dgemma_ext.serve")

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
# Asked for every few seconds by whatever watches the server.
_QUIET = ("/health", "/ready", "/metrics")


class JsonLines(logging.Formatter):
    """A record as a line of JSON; its extra field `facts` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line)


def to_stderr() -> None:
    """Sends the lines of this room, and of uvicorn, to stderr. For a process that is a server and nothing else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("dgemma_ext.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        chosen = logging.getLogger(name)
        chosen.handlers, chosen.propagate = [handler], False
        chosen.setLevel(level)


class RequestLog:
    """Gives every request an id, its own `x-request-id` where that is plain, and logs and counts it at its end.

    An exception that nothing has handled becomes a status 500 here, and a line with its traceback.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        status, began = 0, time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message["headers"])["x-request-id"] = request_id
            await send(message)

        self._service.open_requests += 1
        try:
            await self._app(scope, receive, noted)
        except Exception:
            logger.exception("a request failed", extra={"facts": {"request_id": request_id}})
            if not status:
                error = errors.internal_error()
                await json_answer(error.body, error.status)(scope, receive, noted)
        finally:
            self._service.open_requests -= 1
            self._note(scope, request_id, status, time.monotonic() - began)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")  # a path of a client's own making would be a label of its own
        self._service.metrics.note_request(path, status)
        facts = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            **_of_call(scope.get("dgemma.call"), self._service.options.log_prompts),
        }
        if "dgemma.prompt" in scope:
            facts["prompt"] = scope["dgemma.prompt"]
        level = logging.DEBUG if path in _QUIET else logging.INFO
        logger.log(level, "request", extra={"facts": facts})


def _of_call(call: Call | None, with_text: bool) -> dict[str, Any]:
    if call is None:
        return {}
    facts: dict[str, Any] = {
        "prompt_tokens": [len(one.prompt_ids) for one in call.submissions],
        "completion_tokens": [len(answer.token_ids) for answer in call.answers],
        "denoising_steps": [sum(answer.denoising_steps) for answer in call.answers],
        "finish_reasons": [answer.finish_reason for answer in call.answers],
        "seeds": [one.seed for one in call.submissions],
    }
    return facts | {"answers": [answer.text for answer in call.answers]} if with_text else facts
