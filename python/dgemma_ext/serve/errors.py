"""Errors that a client gets: a status, and OpenAI's error object.

A message for a client names its field and never a path of the server.
"""

from __future__ import annotations

import re
from typing import Any

from dgemma_ext.engine import NotEnoughMemory
from dgemma_ext.errors import NonFiniteError

# Engine's arguments by the names that clients know them by.
_FIELDS = {"max_new_tokens": "max_tokens", "prompt": "prompt", "thinking_budget": "thinking_token_budget"}
_SAMPLER_FIELDS = (
    "max_denoising_steps",
    "entropy_bound",
    "t_min",
    "t_max",
    "stability_threshold",
    "confidence_threshold",
    "canvas_length",
    "trim_canvas",
    "start_step",
)
# In the error of a step that was broken off, which names what broke it.
_OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|MemoryError|out of memory")
_NAME = re.compile(r"[a-z_]+(?:\[\d+\]|\['\w+'\]|\.\w+)*")


class ApiError(Exception):
    """A request that cannot be served.

    status: of HTTP. type: OpenAI's class of error. param: the field at fault. code: for programs. headers: more of the
    answer's.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def not_supported(param: str, message: str) -> ApiError:
    """For a field that would change the answer and cannot be honoured."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def unknown_model(name: str) -> ApiError:
    return ApiError(404, f"the model {name!a} is not served here", param="model", code="model_not_found")


def busy(retry_after: int) -> ApiError:
    message = "too many requests are waiting; try again later"
    headers = {"retry-after": str(retry_after)}
    return ApiError(429, message, type="rate_limit_error", code="queue_full", headers=headers)


def unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, type="server_error", code=code, headers={"retry-after": "1"})


def draining() -> ApiError:
    return unavailable("the server is shutting down", "shutting_down")


def not_started() -> ApiError:
    return unavailable("the engine does not run: nothing has run the application's lifespan", "not_ready")


def internal_error() -> ApiError:
    return ApiError(500, "the server failed; its log has the reason under this request's id", type="server_error")


def from_engine(error: BaseException) -> ApiError:
    """What a client is told of an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NotEnoughMemory | MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return unavailable("there is not enough memory for this request now", "out_of_memory")
    if isinstance(error, NonFiniteError):
        message = f"the model's numbers are not finite at denoising step {error.step}"
        return ApiError(500, message, type="server_error", code="non_finite")
    if isinstance(error, ValueError):
        return from_value_error(error)
    return internal_error()


def from_value_error(error: ValueError, param: str | None = None) -> ApiError:
    """The 400 of a refused argument. `param` is the field where the message does not name one of the request."""
    message = str(error)
    if "positions" in message and "max_new_tokens" in message:
        code = "context_length_exceeded"
        return bad_request(message.replace("max_new_tokens", "max_tokens"), "max_tokens", code)
    match = _NAME.match(message)
    name = match.group() if match else ""
    root = re.split(r"[.\[]", name)[0]
    if root == "canvas":
        return bad_request(message, "diffusion")
    if root in _SAMPLER_FIELDS:
        return bad_request(message, f"diffusion.{name}")
    if root in _FIELDS:
        return bad_request(_FIELDS[root] + message[len(root) :], param or _FIELDS[root])
    return bad_request(message, re.sub(r"\['(\w+)'\]", r".\1", name) if root in _OWN_NAMES else param)


_OWN_NAMES = ("messages", "tools", "chat_template_kwargs", "enable_thinking", "seed")
