"""Runs the application on uvicorn, and ends it by signals.

The first SIGTERM or SIGINT drains: new requests get status 503, the running ones finish, and the process ends well. A
second one ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.serve.app import build
from dgemma_ext.serve.connection import HttpProtocol
from dgemma_ext.serve.logs import to_stderr
from dgemma_ext.serve.options import ServeOptions
from dgemma_ext.serve.service import Service

logger = logging.getLogger("dgemma_ext.serve")

# How often a server that drains looks whether it is done.
_LOOK = 0.05


class Server(uvicorn.Server):
    """A server that drains before it closes its door, so that a load balancer can read /ready meanwhile."""

    def __init__(self, app: FastAPI, options: ServeOptions) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=options.host,
                port=options.port,
                log_config=None,
                access_log=False,
                lifespan="on",
                server_header=False,
                timeout_graceful_shutdown=int(options.drain_timeout) + 1,
                ws="none",
                http=type(
                    "Connection",
                    (HttpProtocol,),
                    {"head_seconds": options.body_timeout, "stalled_seconds": options.request_timeout},
                ),
            )
        )
        self.service: Service = app.state.service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn installs this for both signals; it runs in the main thread, which is the loop's."""
        if self.service.is_draining or self._loop is None or not self.started:
            os._exit(128 + sig)  # a step may be under way in the engine's thread, and nobody waits for it
        self.service.is_draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        service = self.service
        logger.info("draining", extra={"facts": {"open_requests": service.open_requests}})
        ends = asyncio.get_running_loop().time() + service.options.drain_timeout
        while (service.engine.live or service.open_requests) and asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(_LOOK)
        self.should_exit = True


def serve(model: DiffusionGemma, options: ServeOptions) -> None:
    to_stderr()
    server = Server(build(model, options), options)
    sock = bound_socket(options)
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if not options.is_local and options.api_key is None:
        logger.warning("every machine that reaches this one can use the model: it listens on %s without a key", shown)
    facts = {"url": f"http://{shown}:{port}", "model": options.served_model_names[0], "max_batch": options.max_batch}
    logger.info("serving", extra={"facts": facts})
    server.run([sock])
    logger.info("stopped")


def bound_socket(options: ServeOptions) -> socket.socket:
    """The socket to listen on, taken before anything else: a port that is taken is an error of one line."""
    family, kind, protocol, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {options.host} port {options.port}: {error.strerror}") from error
    return sock
