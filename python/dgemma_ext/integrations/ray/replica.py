"""A replica: the model, its engine thread, and the application of `dgemma serve`, called by the ingress."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from prometheus_client import generate_latest
from ray import serve
from starlette.types import Message, Scope

from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.serve import ServeOptions, build_app
from dgemma_ext.serve.logs import to_stderr
from dgemma_ext.serve.service import Service

REPLICA_HEADER = b"x-replica-id"


class Replica:
    """What Ray starts on a machine. loading: the arguments of `from_pretrained`, which is called here."""

    async def __init__(self, loading: dict[str, Any], options: ServeOptions) -> None:  # type: ignore[misc]
        to_stderr()
        self._name = serve.get_replica_context().replica_id.unique_id
        model = await asyncio.to_thread(DiffusionGemma.from_pretrained, **loading)
        self._app = build_app(model, options)
        self._service: Service = self._app.state.service
        self._running = AsyncExitStack()
        await self._running.enter_async_context(self._app.router.lifespan_context(self._app))

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The messages of ASGI that answer a request.

        Ray cancels this where the ingress lets go of it, because its client has left; that ends the application's part,
        whose slot is free after the step that is under way.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if incoming:
                return incoming.pop()
            await asyncio.Event().wait()  # a client that has left is told by cancelling
            raise AssertionError

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (REPLICA_HEADER, self._name.encode())]
                message = {**message, "headers": headers}
            messages.put_nowait(message)

        async def run() -> None:
            try:
                await self._app(scope, receive, send)
            finally:
                messages.put_nowait(None)

        running = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def metrics(self) -> tuple[str, str]:
        """This replica's name, and its part of /metrics."""
        return self._name, generate_latest(self._service.metrics.registry).decode()

    async def check_health(self) -> None:
        """Raises RuntimeError where the engine's thread has given up; Ray then starts another replica."""
        if not self._service.engine.is_alive:
            raise RuntimeError("the engine has stopped")

    async def __del__(self) -> None:
        """Ray awaits this when the last request of a replica that drains has been answered."""
        if hasattr(self, "_running"):
            await self._running.aclose()
