"""What every route needs: the service behind it, what goes into its log line, and how its failures are described."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from dgemma_ext.serve.call import Call
from dgemma_ext.serve.images import for_log
from dgemma_ext.serve.protocol.common import ErrorBody
from dgemma_ext.serve.service import Service

_DESCRIPTIONS = {
    400: "The request cannot be used; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "The model is not served here.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too many requests wait; `retry-after` tells in seconds when to try again.",
    500: "The server failed.",
    503: "The server ends, the answer took too long, or memory is short.",
}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The failures of a route for the interface's description; without statuses, all."""
    wanted = statuses or tuple(_DESCRIPTIONS)
    return {status: {"model": ErrorBody, "description": _DESCRIPTIONS[status]} for status in wanted}


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def stated(request: Request, call: Call, prompt: Any) -> None:
    """Leaves what a call is for the log line of its request."""
    request.scope["dgemma.call"] = call
    if service_of(request).options.log_prompts:
        request.scope["dgemma.prompt"] = for_log(prompt)
