"""The ingress with replicas that a test speaks for: what a client gets when they fail. No Ray is started."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray has an environment of its own: make test-ray", allow_module_level=True)

import ray_cluster  # noqa: F401  first: it says what Ray reads when it is imported
from dgemma_ext.integrations.ray import ingress, router
from dgemma_ext.serve import ServeOptions

BODY = {"messages": [{"role": "user", "content": "Hello"}]}
PLAIN = [(b"content-type", b"application/json"), (b"x-request-id", b"1")]
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def start(headers: Any = PLAIN, status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def piece(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Engine:
    """A handle of replicas: each call takes the next script of messages, errors to raise and seconds to wait."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.asked: list[tuple[str, Any, bytes]] = []
        self.cancelled = 0
        self._session = ""

    def options(self, session_id: str = "", stream: bool = True) -> Engine:
        self._session = session_id
        return self

    @property
    def answer(self) -> Engine:
        return self

    def remote(self, scope: Any, body: bytes) -> Any:
        self.asked.append((self._session, scope, body))
        return _Messages(self, self.scripts.pop(0))


class _Messages:
    def __init__(self, engine: Engine, script: list[Any]) -> None:
        self._engine = engine
        self._script = script

    async def __aiter__(self) -> AsyncIterator[Any]:
        for entry in self._script:
            if isinstance(entry, BaseException):
                raise entry
            if isinstance(entry, float):
                await asyncio.sleep(entry)
            else:
                yield entry

    def cancel(self) -> None:
        self._engine.cancelled += 1


def ask(engine: Engine, path: str = "/v1/chat/completions", **options: Any) -> httpx2.Response:
    application = ingress.Ingress(engine, ServeOptions(**options)).__serve_build_asgi_app__()

    async def answer() -> httpx2.Response:
        transport = httpx2.ASGITransport(application)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=BODY)

    return asyncio.run(answer())


def lost() -> BaseException:
    return ingress.RayError("the actor died")


def test_an_answer_passes_through() -> None:
    engine = Engine([start(), piece(b"{}")])
    answer = ask(engine)
    assert (answer.status_code, answer.text) == (200, "{}")
    assert "x-request-id" not in answer.headers  # Ray's proxy adds it
    ((session, scope, body),) = engine.asked
    assert session
    assert scope["path"] == "/v1/chat/completions"
    assert b"Hello" in body


@pytest.mark.parametrize(
    "script",
    [
        [],
        [start()],
        [start(STREAM)],
        [start(STREAM), piece(b"data: head\n\n", more=True)],
    ],
)
def test_a_replica_that_dies_before_it_has_told_anything_is_replaced(script: list[Any]) -> None:
    engine = Engine([*script, lost()], [start(), piece(b"{}")])
    answer = ask(engine)
    assert (answer.status_code, answer.text) == (200, "{}")
    assert len(engine.asked) == 2
    assert engine.cancelled == 2


def test_a_stream_that_has_begun_ends_in_an_error() -> None:
    begun = [start(STREAM), piece(b"data: 1\n\n", more=True), piece(b"data: 2\n\n", more=True), lost()]
    answer = ask(Engine(begun))
    assert answer.status_code == 200
    first, second, error, done = answer.text.strip().split("\n\n")
    assert (first, second, done) == ("data: 1", "data: 2", "data: [DONE]")
    assert '"code":"replica_lost"' in error
    responses = ask(Engine(begun), "/v1/responses").text
    assert 'event: error\ndata: {"type":"error"' in responses


@pytest.mark.parametrize(
    ("scripts", "status", "code"),
    [
        ([[lost()]] * 3, 503, "replica_lost"),
        ([[ingress.DeploymentUnavailableError(None)]], 503, "no_replica"),
        ([[ingress.BackPressureError(9, 8)]], 429, "queue_full"),
        ([[5.0, start()]], 503, "no_replica"),
        ([[ingress.RayTaskError("answer", "a traceback", ValueError("no"))]], 500, None),
    ],
)
def test_when_no_replica_answers(scripts: list[Any], status: int, code: str | None) -> None:
    engine = Engine(*scripts)
    answer = ask(engine, request_timeout=0.2)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert not engine.scripts
    assert engine.cancelled == len(scripts)
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert "traceback" not in answer.text


def test_keys_and_limits_are_checked_before_a_replica_is_asked() -> None:
    engine = Engine()
    assert ask(engine, api_key="secret").status_code == 401
    assert ask(engine, max_body_bytes=10).status_code == 413
    assert not engine.asked


@pytest.mark.parametrize(
    ("lengths", "places"),
    [([0, 0], [0, 1]), ([4, 3], [1, 0]), ([4, 4], [0, 1]), ([9, 5], [1, 0]), ([3, 0], [0, 1]), ([5, 9, 1], [2, 0, 1])],
)
def test_a_full_replica_is_asked_after_one_with_room(lengths: list[int], places: list[int]) -> None:
    assert router.by_room(lengths, slots=4) == places
