"""A server inside this process, on a free port of this machine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import openai

import dgemma_ext as dg
from dgemma_ext import demo
from dgemma_ext.serve import ServeOptions, build_app
from dgemma_ext.serve.server import Server, bound_socket
from dgemma_ext.serve.service import Service

MODEL = "demo"
PUZZLE = demo.draw(6, seed=1).text
MESSAGES: list[Any] = [{"role": "user", "content": PUZZLE}]
# The server's defaults, where they differ from the engine's.
SAMPLER = dg.SamplerConfig(trim_canvas=True)
# Longer than anything here takes.
PATIENCE = 60.0


@dataclass(frozen=True)
class Running:
    url: str
    service: Service

    @property
    def model(self) -> dg.DiffusionGemma:
        return self.service.model

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def client(self, **settings: Any) -> openai.OpenAI:
        named = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **settings}
        return openai.OpenAI(base_url=f"{self.url}/v1", **named)

    def async_client(self, **settings: Any) -> openai.AsyncOpenAI:
        named = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **settings}
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **named)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left of any request: no slot, no place in the queue, no open response."""
        engine = self.service.engine
        scheduler = engine.scheduler
        return not engine.live and scheduler.idle and scheduler.free_slots == scheduler.max_batch

    def wait_until_empty(self) -> None:
        wait_until(lambda: self.is_empty and not self.service.open_requests)


def wait_until(condition: Any, seconds: float = PATIENCE) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it takes too long"
        time.sleep(0.01)


@cache
def bundled(size: int = 6) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(demo.checkpoint(size), device="cpu")


@contextmanager
def running(model: dg.DiffusionGemma, send_buffer: int | None = None, **options: Any) -> Iterator[Running]:
    """send_buffer: bytes that the system takes for a client that does not read."""
    chosen = ServeOptions(port=0, served_model_names=[MODEL], **options)
    app = build_app(model, chosen)
    server = Server(app, chosen)
    sock = bound_socket(chosen)
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", app.state.service)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
