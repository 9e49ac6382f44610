"""`dgemma serve` as a process of its own: its lines, curl, and the signals that end it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest

import dgemma_ext as dg
from command import dgemma
from serving import PATIENCE, bundled, wait_until

SECRET = "correct-horse-battery"
PROMPT = "62..14...62.4.23653.5.42..1.5654.23."
CHAT: dict[str, Any] = {"model": "6x6", "messages": [{"role": "user", "content": PROMPT}]}
# Every step is made, 48 for a canvas, so that a signal finds requests under way.
SLOW = CHAT | {"diffusion": {"confidence_threshold": 0}}


@dataclass
class Process:
    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    raw: str = ""

    @property
    def url(self) -> str:
        return str(next(line["url"] for line in self.lines if "url" in line))

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.raw += line
            with contextlib.suppress(ValueError):
                self.lines.append(json.loads(line))


@contextlib.contextmanager
def served(*arguments: str, **environment: str) -> Iterator[Process]:
    command = [sys.executable, "-c", "import sys; from dgemma_ext.cli import main; sys.exit(main())", "serve", "6x6"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    found = Process(process)
    reader = threading.Thread(target=found.read, daemon=True)
    reader.start()
    try:
        wait_until(lambda: any("url" in line for line in found.lines) or process.poll() is not None)
        wait_until(lambda: process.poll() is not None or is_ready(found.url))
        yield found
    finally:
        process.kill()
        process.wait()
        reader.join(PATIENCE)
        assert process.stderr is not None
        process.stderr.close()


def is_ready(url: str) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        return httpx2.get(f"{url}/ready").status_code == 200
    return False


def holds(url: str, running: int, waiting: int) -> bool:
    """Whether so many requests have a slot and so many wait for one."""
    metrics = httpx2.get(f"{url}/metrics").text.splitlines()
    return {f"dgemma_requests_running {running}.0", f"dgemma_requests_waiting {waiting}.0"} <= set(metrics)


def test_a_day_in_its_life() -> None:
    """Requests by curl; then SIGTERM while 12 are under way, of which 8 still wait for a slot."""
    with served("--max-batch", "4", "--log-prompts", DGEMMA_API_KEY=SECRET) as server:
        curl = shutil.which("curl")
        if curl is not None:
            wanted = bundled().generate(CHAT["messages"], seed=1, sampler=dg.SamplerConfig(trim_canvas=True)).text
            said = curled(curl, server.url, CHAT | {"seed": 1})
            assert json.loads(said)["choices"][0]["message"]["content"] == wanted
            events = curled(curl, server.url, CHAT | {"seed": 1, "stream": True, "diffusion": {"drafts": True}})
            assert events.endswith("data: [DONE]\n\n")
            assert "event: diffusion.draft\n" in events
        answers: list[httpx2.Response] = []
        late: list[httpx2.Response] = []

        def ask(seed: int) -> None:
            with httpx2.Client(headers={"authorization": f"Bearer {SECRET}"}, timeout=PATIENCE) as client:
                asked = SLOW | {"seed": seed, "max_tokens": 37, "stream": seed % 2 == 1}
                answers.append(client.post(f"{server.url}/v1/chat/completions", json=asked))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
        for thread in threads:
            thread.start()
        # Eight alone may be the first to arrive, before a step has given any of them a slot.
        wait_until(lambda: holds(server.url, running=4, waiting=8))
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: any(line["message"] == "draining" for line in server.lines))
        late.append(httpx2.get(f"{server.url}/ready"))
        headers = {"authorization": f"Bearer {SECRET}"}
        late.append(httpx2.post(f"{server.url}/v1/chat/completions", json=CHAT, headers=headers))
        for thread in threads:
            thread.join(PATIENCE)
        assert server.process.wait(PATIENCE) == 0
    assert [answer.status_code for answer in late] == [503, 503]
    assert late[1].json()["error"]["code"] == "shutting_down"
    assert len(answers) == 12
    for answer in answers:
        assert answer.status_code == 200
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.text.endswith("data: [DONE]\n\n")
            assert "error" not in answer.text
        else:
            assert answer.json()["usage"]["completion_tokens"] > 0
    assert SECRET not in server.raw
    noted = [line for line in server.lines if line["message"] == "request" and line["status"] == 200]
    assert len(noted) >= 12
    assert {"request_id", "seconds", "prompt_tokens", "completion_tokens", "seeds"} <= noted[-1].keys()
    assert noted[-1]["prompt"] == CHAT["messages"]


def curled(curl: str, url: str, body: dict[str, Any]) -> str:
    command = [curl, "-sS", "-N", f"{url}/v1/chat/completions", "-H", "content-type: application/json"]
    command += ["-H", f"authorization: Bearer {SECRET}", "-d", json.dumps(body)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout


def test_a_second_signal_ends_it_at_once_and_logs_hold_no_prompts() -> None:
    with served("--host", "0.0.0.0") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert any("without a key" in line["message"] for line in server.lines if line["level"] == "warning")

        def ask() -> None:
            with contextlib.suppress(httpx2.TransportError):
                httpx2.post(f"{url}/v1/chat/completions", json=SLOW | {"max_tokens": 900}, timeout=PATIENCE)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: holds(url, running=1, waiting=0))
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: any(line["message"] == "draining" for line in server.lines))
        server.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert server.process.wait(PATIENCE) == 128 + signal.SIGINT
        assert time.monotonic() - began < 5
        thread.join(PATIENCE)
    assert PROMPT not in server.raw


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--port", "70000"], 2, "port must be an integer in"),
        (["--max-batch", "0"], 2, "max-batch"),
        (["--max-length", "9000000"], 2, ""),
        (["--host", "no.such.host.invalid"], 1, ""),
    ],
)
def test_what_cannot_be_served(arguments: list[str], code: int, words: str) -> None:
    run = dgemma("serve", "6x6", *arguments)
    assert run.code == code, run.err
    assert words in run.err
    assert len(run.err.splitlines()) == 1


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        run = dgemma("serve", "6x6", "--port", port)
    assert run.code == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in run.err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = dgemma("serve", "6x6")
    assert run.code == 2
    assert "pip install 'dgemma_ext[serve]'" in run.err
