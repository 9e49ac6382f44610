"""What stands between Ray's proxy and the replicas: finds a request's replica, and another one where that dies."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import anyio.to_thread
from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma_ext.integrations.ray.conversation import HEADER, session_of
from dgemma_ext.integrations.ray.replica_metrics import merged
from dgemma_ext.serve import ServeOptions, errors
from dgemma_ext.serve.access import guards
from dgemma_ext.serve.http import DONE, json_answer, sent_event, until_gone
from dgemma_ext.serve.logs import to_stderr

logger = logging.getLogger("dgemma_ext.serve")

# Replicas that are asked for an answer before its client gets status 503.
_MOST_TRIES = 3
# Seconds until a probe that no replica answers fails.
_PROBE_TIMEOUT = 10.0
_PROBES = ("/health", "/ready", "/metrics")
# Bytes of a body from which on it is read in another thread, so that it keeps nobody waiting.
_LONG = 1 << 16
# Of a request's scope, what a replica needs; the rest is objects of this process.
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
_BUSY_SECONDS = 5


class Ingress:
    """The deployment that Ray's proxy calls; Ray asks it for its application."""

    def __init__(self, engine: DeploymentHandle, options: ServeOptions) -> None:
        to_stderr()
        self._engine = engine.options(stream=True)
        self._options = options

    def __serve_build_asgi_app__(self) -> ASGIApp:
        routes = [
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/{path:path}", _Forward(self._engine, self._options)),
        ]
        return Starlette(routes=routes, middleware=guards(self._options))

    async def _metrics(self, request: Request) -> Response:
        try:
            pages = await self._engine.broadcast("metrics").results_async(timeout_s=_PROBE_TIMEOUT)
        except (TimeoutError, RayError, RayServeException) as error:
            failure = _no_replica(error)
            return json_answer(failure.body, failure.status, failure.headers)
        return Response(merged(pages), media_type=CONTENT_TYPE_LATEST)


class _Forward:
    """An ASGI application that a replica answers for."""

    def __init__(self, engine: DeploymentHandle, options: ServeOptions) -> None:
        self._engine = engine
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            return
        header = request.headers.get(HEADER)
        if len(body) < _LONG:
            session = session_of(header, body)
        else:
            session = await anyio.to_thread.run_sync(session_of, header, body)
        reply = _Reply(send, request.url.path)
        seconds = _PROBE_TIMEOUT if request.url.path in _PROBES else self._options.request_timeout
        try:
            await until_gone(receive, self._answered(scope, body, session, reply, seconds))
        except errors.ApiError as error:
            await reply.fail(error, scope, receive)

    async def _answered(self, scope: Scope, body: bytes, session: str, reply: _Reply, seconds: float) -> None:
        """Asks replicas until one has answered. Raises ApiError where none does."""
        asked = {name: scope[name] for name in _SCOPE if name in scope}
        asked["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        for tried in range(1, _MOST_TRIES + 1):
            reply.forget()
            messages = self._engine.options(session_id=session).answer.remote(asked, body)
            try:
                async with asyncio.timeout(seconds) as patience:
                    async for message in messages:
                        patience.reschedule(None)  # the replica has its own limit
                        await reply.take(message)
                return
            except TimeoutError as error:
                raise _no_replica(error) from error
            except BackPressureError as error:
                raise errors.busy(_BUSY_SECONDS) from error
            except DeploymentUnavailableError as error:
                raise _no_replica(error) from error
            except RayTaskError as error:
                logger.error("a replica failed: %s", error)
                raise errors.internal_error() from error
            except (RayError, RayServeException) as error:
                logger.warning("a replica was lost: %s", type(error).__name__, extra={"facts": {"tried": tried}})
                if reply.has_begun or tried == _MOST_TRIES:
                    raise errors.unavailable("the replica that answered was lost", "replica_lost") from error
            finally:
                messages.cancel()


class _Reply:
    """What goes to the client. A response is held back until it tells something, because until then another replica may
    answer in its place: a stream until its second piece, for the first says only that there will be an answer."""

    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        self._path = path
        self._held: list[Message] = []
        self._is_stream = False
        self.has_begun = False

    def forget(self) -> None:
        self._held.clear()

    async def take(self, message: Message) -> None:
        if self.has_begun:
            await self._send(message)
            return
        if message["type"] == "http.response.start":
            # Ray's proxy adds the request's id again.
            named = [(name, value) for name, value in message["headers"] if bytes(name).lower() != b"x-request-id"]
            message = {**message, "headers": named}
            kinds = [value for name, value in message["headers"] if bytes(name).lower() == b"content-type"]
            self._is_stream = any(bytes(value).startswith(b"text/event-stream") for value in kinds)
        self._held.append(message)
        is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)
        if is_whole or len(self._held) > (2 if self._is_stream else 1):
            self.has_begun = True
            for held in self._held:
                await self._send(held)
            self._held.clear()

    async def fail(self, error: errors.ApiError, scope: Scope, receive: Receive) -> None:
        """Tells the client: by a status, or in a stream that has begun by an event that ends it."""
        if not self.has_begun:
            await json_answer(error.body, error.status, error.headers)(scope, receive, self._send)
            return
        if not self._is_stream:
            raise error  # the connection breaks, which is all that can be told by now
        await self._send({"type": "http.response.body", "body": self._ending(error), "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _ending(self, error: errors.ApiError) -> bytes:
        if self._path.endswith("/v1/responses"):
            named: dict[str, Any] = {"type": "error", "code": "server_error", "message": error.message, "param": None}
            return sent_event(named, "error")
        return sent_event(error.body) + DONE


def _no_replica(error: BaseException) -> errors.ApiError:
    logger.warning("no replica answers: %s", json.dumps(str(error)[:200]))
    return errors.unavailable("no replica of the model answers now", "no_replica")
