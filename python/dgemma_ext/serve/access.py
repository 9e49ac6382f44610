"""What stands between the network and the routes: the API key, and limits of a body's size and time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma_ext.serve.errors import ApiError
from dgemma_ext.serve.http import json_answer
from dgemma_ext.serve.options import ServeOptions

# What anybody may have: whether the server is alive, its counts, the page, the description. All else wants the key, so
# that nothing is open by an oversight.
_OPEN = frozenset(
    (
        "/",
        "/page/facts",
        "/page/icon.svg",
        "/page/page.css",
        "/page/page.js",
        "/page/pictures.js",
        "/health",
        "/ready",
        "/metrics",
        "/docs",
        "/openapi.json",
    )
)


def guards(options: ServeOptions) -> list[Middleware]:
    """All of them, from the outside to the inside."""
    stack = []
    if options.cors_origins:
        origins = list(options.cors_origins)
        stack.append(Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]))
    if options.api_key is not None:
        stack.append(Middleware(ApiKey, key=options.api_key))
    stack.append(Middleware(BodyLimit, limit=options.max_body_bytes, seconds=options.body_timeout))
    return stack


class ApiKey:
    """Lets a request through where its path is open or it has the key: `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._digest = _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _own_path(scope) not in _OPEN and not self._has_key(scope):
            error = ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                type="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await json_answer(error.body, error.status, error.headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        """Digests are compared, because the time that a comparison takes tells the length of what is compared."""
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(_digest(key.strip()), self._digest) and scheme.lower() == b"bearer"


class BodyLimit:
    """Refuses bodies that are too large, or take too long to arrive."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self._app = app
        self._limit = limit
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        try:
            if declared.isdecimal() and int(declared) > self._limit:
                raise self._too_large()
            await self._app(scope, self._limited(receive), send)
        except ApiError as error:
            await json_answer(error.body, error.status, error.headers)(scope, receive, send)

    def _limited(self, receive: Receive) -> Callable[[], Awaitable[Message]]:
        taken, is_whole = 0, False
        ends = asyncio.get_running_loop().time() + self._seconds

        async def limited() -> Message:
            nonlocal taken, is_whole
            if is_whole:  # what comes now is the end of the connection
                return await receive()
            try:
                async with asyncio.timeout_at(ends):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the body did not arrive in time", code="body_timeout") from None
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
                if taken > self._limit:
                    raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._limit} bytes", code="body_too_large")


def _own_path(scope: Scope) -> str:
    """The path below the one that the application is mounted at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
