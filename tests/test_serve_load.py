"""Many requests at once: equal bits, queues, clients that leave, steps that fail, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
import torch

import dgemma_ext as dg
from dgemma_ext import demo
from dgemma_ext.errors import NonFiniteError
from dgemma_ext.serve import ServeOptions, build_app, job_runner
from dgemma_ext.serve.mailbox import Mailbox
from serving import MODEL, PATIENCE, Running, bundled, running, wait_until

CLIENTS, REQUESTS = 16, 200
# Few steps, so that an answer takes tens of milliseconds and depends on its seed.
STEPS = {"diffusion": {"max_denoising_steps": 2}}
SAMPLER = dg.SamplerConfig(trim_canvas=True, max_denoising_steps=2)


# Every step is made, 48 for a canvas.
SLOW: dict[str, Any] = {"messages": [{"role": "user", "content": "."}], "diffusion": {"confidence_threshold": 0}}


def raw(body: dict[str, Any], more: str = "") -> bytes:
    """A request as its bytes, for clients that behave as no library lets them."""
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{more}"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(bundled(), max_batch=4, max_waiting=60) as started:
        yield started


def asked(rng: random.Random) -> dict[str, Any]:
    puzzle = demo.draw(6, rng.randrange(20)).text
    blanks = "".join(rng.choice([".", digit]) for digit in puzzle)
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": blanks}],
        "seed": rng.randrange(2**53),
        "max_tokens": rng.choice([5, 20, 37, 60]),
    }


async def read_stream(client: openai.AsyncOpenAI, request: dict[str, Any], leave_after: int | None, **more: Any) -> str:
    text = ""
    stream = await client.chat.completions.create(**request, stream=True, extra_body=more)
    async for number, chunk in aenumerate(stream):
        text += chunk.choices[0].delta.content or ""
        if number == leave_after:
            await stream.close()
            return "left"
    return text


async def aenumerate(stream: Any) -> Any:
    number = 0
    async for item in stream:
        yield number, item
        number += 1


def test_every_answer_is_the_models_own_whatever_else_runs(server: Running) -> None:
    """Whole, streamed and with drafts; some clients leave in the middle, some give up waiting."""
    rng = random.Random(0)
    requests = [asked(rng) for _ in range(REQUESTS)]
    ways = [rng.choice(["whole", "stream", "drafts", "leave", "timeout", "cancel"]) for _ in requests]
    found: dict[int, str] = {}

    async def one(client: openai.AsyncOpenAI, index: int) -> str:
        request, way = requests[index], ways[index]
        if way == "whole":
            completion = await client.chat.completions.create(**request, extra_body=STEPS)
            return str(completion.choices[0].message.content)
        if way == "timeout":
            try:
                await client.chat.completions.create(**request, extra_body=STEPS, timeout=0.01)
            except openai.APITimeoutError:
                return "left"
            return "in time"
        if way == "cancel":
            task = asyncio.ensure_future(client.chat.completions.create(**request, extra_body=STEPS))
            await asyncio.sleep(rng.random() * 0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return "left"
        drafts = {"diffusion": {**STEPS["diffusion"], "drafts": way != "stream"}}
        return await read_stream(client, request, rng.randrange(3) if way == "leave" else None, **drafts)

    async def worker(numbers: Iterator[int]) -> None:
        async with server.async_client() as client:
            for index in numbers:
                found[index] = await one(client, index)

    async def run() -> None:
        numbers = iter(range(REQUESTS))
        await asyncio.gather(*(worker(numbers) for _ in range(CLIENTS)))

    asyncio.run(run())
    answered = [index for index in range(REQUESTS) if ways[index] in ("whole", "stream", "drafts")]
    assert len(answered) > 80
    assert Counter(found.values())["left"] > 50
    for index in answered:
        request = requests[index]
        out = server.model.generate(request["messages"], request["max_tokens"], seed=request["seed"], sampler=SAMPLER)
        assert found[index] == out.text, index
    server.wait_until_empty()


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    with running(bundled(), max_batch=1, max_waiting=2) as small, httpx2.Client(timeout=PATIENCE) as client:
        slow = {
            "messages": [{"role": "user", "content": "."}],
            "stream": True,
            "diffusion": {"confidence_threshold": 0},
        }
        streams = [client.stream("POST", f"{small.url}/v1/chat/completions", json=slow) for _ in range(3)]
        for stream in streams:
            stream.__enter__()
        refused = client.post(f"{small.url}/v1/chat/completions", json=slow)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "queue_full"
        several = client.post(f"{small.url}/v1/chat/completions", json=slow | {"n": 4})
        assert (several.status_code, several.json()["error"]["param"]) == (400, "n")
        metrics = client.get(f"{small.url}/metrics").text
        assert "dgemma_requests_waiting 2.0" in metrics
        for stream in streams:
            stream.__exit__(None, None, None)
        small.wait_until_empty()
        assert client.post(f"{small.url}/v1/chat/completions", json=slow | {"stream": False}).status_code == 200


def test_a_client_that_leaves_frees_its_slot_within_a_step(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    step = dg.Scheduler.step

    def counted(self: dg.Scheduler) -> Any:
        nonlocal steps
        time.sleep(0.05)  # a step of a larger model
        steps += 1
        return step(self)

    monkeypatch.setattr(dg.Scheduler, "step", counted)
    for stream in (True, False):
        with socket.create_connection(server.address) as sock:
            sock.sendall(raw(SLOW | {"stream": stream}))
            wait_until(lambda: server.service.engine.running == 1)
        left = steps
        server.wait_until_empty()
        # The step that is under way, and one more if the connection's end came just behind it.
        assert steps - left <= 2


def test_a_slow_client_keeps_nobody_waiting() -> None:
    """It does not read its drafts, which fill its socket; others are answered meanwhile, and it still gets its text."""
    asked = SLOW | {"max_tokens": 74, "seed": 1, "stream": True}
    asked["diffusion"] = SLOW["diffusion"] | {"drafts": True}
    with running(bundled(), send_buffer=4096) as started, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(started.address)
        sock.sendall(raw(asked, "connection: close\r\n"))
        wait_until(lambda: started.service.engine.running == 1)
        for seed in range(3):
            quick = {"messages": [{"role": "user", "content": "1"}], "seed": seed, **STEPS}
            assert httpx2.post(f"{started.url}/v1/chat/completions", json=quick, timeout=PATIENCE).status_code == 200
        wait_until(lambda: not started.service.engine.live)
        answer = b""
        sock.settimeout(PATIENCE)
        while piece := sock.recv(65536):
            answer += piece
    events = [json.loads(line[6:]) for line in answer.decode().splitlines() if line.startswith("data: {")]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    drafts = sum("tokens" in event.get("diffusion", {}) for event in events)
    sampler = dg.SamplerConfig(trim_canvas=True, confidence_threshold=0)
    out = bundled().generate(asked["messages"], 74, sampler=sampler, seed=1)
    assert text == out.text
    assert 8 <= drafts < sum(out.denoising_steps), "drafts that nobody took were kept"


def test_a_client_that_never_reads_is_left() -> None:
    asked = SLOW | {"max_tokens": 900, "stream": True}
    asked["diffusion"] = SLOW["diffusion"] | {"drafts": True}
    with running(bundled(), send_buffer=4096, request_timeout=1.0) as started, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(started.address)
        sock.sendall(raw(asked))
        wait_until(lambda: started.service.open_requests == 1)
        started.wait_until_empty()


def test_an_answer_that_takes_too_long() -> None:
    with running(bundled(), request_timeout=0.2) as hurried:
        slow = SLOW | {"max_tokens": 900}
        whole = httpx2.post(f"{hurried.url}/v1/chat/completions", json=slow, timeout=PATIENCE)
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "request_timeout")
        client = hurried.client()
        with pytest.raises(openai.APIError, match="too long"):
            for _ in client.chat.completions.create(
                model=MODEL, messages=slow["messages"], stream=True, extra_body=slow
            ):
                pass
        hurried.wait_until_empty()


# Steps that fail ------------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_fail_their_request_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = dg.Scheduler.step

    def poisoned(self: dg.Scheduler) -> Any:
        events = begin(self)
        for place, event in enumerate(events):
            if event.request.seed == 666 and isinstance(event, dg.Draft):
                error = NonFiniteError("a logit is not finite", request=event.request.number, step=event.step)
                events[place] = self._fail(event.request, error)
        return events

    monkeypatch.setattr(dg.Scheduler, "step", poisoned)
    answers = together(server, [1, 666, 2])
    assert answers[0][0] == answers[2][0] == 200
    status, body = answers[1]
    assert (status, body["error"]["code"]) == (500, "non_finite")
    server.wait_until_empty()


def test_a_step_that_breaks_off_fails_the_request_to_blame_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that share the step lose their slots; they are run again by themselves, to the same tokens."""
    run = dg.engine.group.CanvasGroup.step
    broken = Counter[int]()

    def breaking(self: Any) -> Any:
        seeds = [request.seed for request in self.members]
        # Not before they share a step, and not in a first canvas, so that something has been told already.
        if 666 in seeds and all(len(request.denoising_steps) == 2 for request in self.members):
            broken[len(seeds)] += 1
            raise MemoryError("no room")
        return run(self)

    monkeypatch.setattr(dg.engine.group.CanvasGroup, "step", breaking)
    answers = together(server, [1, 666, 2], max_tokens=74)
    assert broken[1] == 1
    assert sum(broken.values()) > 1, "no step was shared"
    for seed, (status, body) in zip((1, 2), (answers[0], answers[2]), strict=True):
        assert status == 200
        out = server.model.generate([{"role": "user", "content": "." * 36}], 74, seed=seed, sampler=LONG)
        assert body["choices"][0]["message"]["content"] == out.text
    status, body = answers[1]
    assert (status, body["error"]["code"]) == (503, "out_of_memory")
    server.wait_until_empty()


def broken(self: Any) -> Any:
    raise RuntimeError("the device is gone")


def test_an_engine_that_cannot_go_on_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on for as long as its device answers, whatever requests do to their steps."""
    url = "{}/v1/chat/completions"
    with running(bundled(), max_batch=2) as doomed:
        with monkeypatch.context() as patch:
            patch.setattr(dg.engine.group.CanvasGroup, "step", broken)
            for _ in range(20):
                answer = httpx2.post(url.format(doomed.url), json=LONG_CHAT, timeout=PATIENCE)
                assert answer.status_code == 500
                assert "device" not in answer.text
        assert httpx2.post(url.format(doomed.url), json=LONG_CHAT, timeout=PATIENCE).status_code == 200
        monkeypatch.setattr(dg.engine.group.CanvasGroup, "step", broken)
        monkeypatch.setattr(job_runner, "answers", lambda device: False)
        assert httpx2.post(url.format(doomed.url), json=LONG_CHAT, timeout=PATIENCE).status_code == 503
        wait_until(lambda: not doomed.service.engine.is_alive)
        for path in ("health", "ready"):
            assert httpx2.get(f"{doomed.url}/{path}").status_code == 503
        answer = httpx2.post(url.format(doomed.url), json=LONG_CHAT, timeout=PATIENCE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")


def test_an_error_that_ends_no_request_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step would break off in the same way, and the one after it."""
    with running(bundled()) as doomed:
        monkeypatch.setattr(dg.Scheduler, "step", broken)
        answer = httpx2.post(f"{doomed.url}/v1/chat/completions", json=LONG_CHAT, timeout=PATIENCE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")


def test_a_device_answers() -> None:
    assert job_runner.answers(torch.device("cpu"))


def test_a_deadline_counts_from_when_the_request_came() -> None:
    """Not from when the scheduler gets it, which may be a step later, nor anew for one that is run again."""
    sampler = dg.SamplerConfig(max_denoising_steps=1000, confidence_threshold=0)
    asked = job_runner.Submission(dg.engine.TokenizedPrompt([1]), sampler=sampler, deadline=PATIENCE)
    job = job_runner.Job(asked, Mailbox(), 0)
    job.began -= PATIENCE + 1
    runner = job_runner.JobRunner(dg.Scheduler(bundled(), max_batch=1))
    runner.submit(job)
    runner.advance()
    (_, last) = runner.take_events()[-1]
    assert isinstance(last, dg.Commit)
    assert (last.finish_reason, last.denoising_steps) == ("deadline", 1)


LONG = dg.SamplerConfig(trim_canvas=True, max_denoising_steps=6, confidence_threshold=0, eos_token_ids=())
LONG_CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "." * 36}],
    "diffusion": {"max_denoising_steps": 6, "confidence_threshold": 0},
}


def together(server: Running, seeds: list[int], **more: Any) -> list[tuple[int, Any]]:
    """Status and body of requests that differ in their seeds and run together."""
    answers: dict[int, tuple[int, Any]] = {}

    def ask(seed: int) -> None:
        asked = LONG_CHAT | {"seed": seed, **more}
        response = httpx2.post(f"{server.url}/v1/chat/completions", json=asked, timeout=PATIENCE)
        answers[seed] = response.status_code, response.json()

    with pytest.MonkeyPatch.context() as patch:
        # Answers without an end of text take all the canvases that they may.
        endless = replace(server.model.defaults, eos_token_ids=())
        patch.setattr(server.service.engine.scheduler, "defaults", endless)
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    return [answers[seed] for seed in seeds]


def test_the_loop_turns_while_a_long_prompt_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(bundled()) as started:
        encode = dg.Tokenizer.encode_prompt
        slowed = threading.Event()

        def slow(self: dg.Tokenizer, *args: Any, **named: Any) -> Any:
            slowed.set()
            time.sleep(1.0)
            return encode(self, *args, **named)

        monkeypatch.setattr(dg.Tokenizer, "encode_prompt", slow)
        chat = {"messages": [{"role": "user", "content": "1"}], **STEPS}
        thread = threading.Thread(
            target=lambda: httpx2.post(f"{started.url}/v1/chat/completions", json=chat, timeout=PATIENCE)
        )
        thread.start()
        assert slowed.wait(PATIENCE)
        began = time.monotonic()
        assert httpx2.get(f"{started.url}/health").status_code == 200
        assert time.monotonic() - began < 0.8
        thread.join(PATIENCE)


def test_long_texts_wait_for_each_other() -> None:
    """Each takes memory while it is tokenized, and there may be as many as clients."""
    service = build_app(bundled(), ServeOptions()).state.service
    begun, may_end = [0], threading.Event()

    def work() -> None:
        begun[0] += 1
        may_end.wait(PATIENCE)

    async def run() -> int:
        tasks = [asyncio.ensure_future(service.in_thread("prompt", work)) for _ in range(20)]
        while begun[0] < 8:
            await asyncio.sleep(0)
        for _ in range(1000):
            await asyncio.sleep(0)
        most = begun[0]
        may_end.set()
        await asyncio.gather(*tasks)
        return most

    assert asyncio.run(run()) == 8
    assert begun == [20]


def test_nothing_is_left(server: Running) -> None:
    server.wait_until_empty()
    assert server.service.engine.scheduler.cache.max_length == 1024
