"""Log-probabilities and deadlines through the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from chats import answering
from models import random_model
from serving import MESSAGES, MODEL, PATIENCE, PUZZLE, SAMPLER, Running, bundled, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(bundled()) as started:
        yield started


@pytest.mark.parametrize("stream", [False, True])
def test_a_chats_tokens(stream: bool, server: Running) -> None:
    out = server.model.generate(MESSAGES, seed=3, sampler=SAMPLER, logprobs=4)
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "seed": 3, "logprobs": True, "top_logprobs": 4}
    client = server.client()
    found: list[Any] = []
    if stream:
        for chunk in client.chat.completions.create(**asked, stream=True):
            told = chunk.choices[0].logprobs
            found += [] if told is None else told.content or []
    else:
        told = client.chat.completions.create(**asked).choices[0].logprobs
        assert told is not None
        found = told.content or []
    assert out.logprobs is not None
    tokenizer = server.service.tokenizer
    assert [one.token for one in found] == list(out.text)  # digits, and not the end of the turn
    assert len(found) == len(out.token_ids) - 1
    for one, wanted in zip(found, out.logprobs, strict=False):
        assert one.logprob == wanted.logprob
        assert one.bytes == list(one.token.encode())
        assert [other.logprob for other in one.top_logprobs] == list(wanted.top_logprobs)
        assert [other.token for other in one.top_logprobs] == [
            tokenizer.decode([token], skip_special_tokens=False) for token in wanted.top_ids
        ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_completions_tokens_up_to_a_stop_string(stream: bool, server: Running) -> None:
    tokenizer = server.service.tokenizer
    ids = tokenizer.encode_prompt(MESSAGES)
    out = server.model.generate(ids, seed=3, sampler=SAMPLER, logprobs=2)
    stop = out.text[20:23]
    cut = out.text.index(stop)
    asked: dict[str, Any] = {"model": MODEL, "prompt": ids, "seed": 3, "logprobs": 2, "stop": stop}
    client = server.client()
    text, found = "", {"tokens": [], "token_logprobs": [], "text_offset": []}
    chunks = client.completions.create(**asked, stream=True) if stream else [client.completions.create(**asked)]
    for chunk in chunks:
        text += chunk.choices[0].text
        told = chunk.choices[0].logprobs
        assert told is not None
        for name, values in found.items():
            values += getattr(told, name)
    assert text == out.text[:cut]
    assert "".join(found["tokens"]) == text
    assert found["text_offset"] == list(range(cut))
    assert out.logprobs is not None
    assert found["token_logprobs"] == [one.logprob for one in out.logprobs[:cut]]


def test_thoughts_and_calls_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "<|channel>thought\nhm\n<channel|>Yes<|tool_call>call:look{}<tool_call|>!<turn|>")
    with running(random_model(max_positions=2048)) as started:
        (choice,) = started.client().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=100,
            logprobs=True,
            extra_body={"diffusion": {"max_denoising_steps": 2}},
        ).choices  # fmt: skip
    assert choice.message.content == "Yes!"
    assert choice.logprobs is not None
    assert "".join(one.token for one in choice.logprobs.content or []) == "Yes!"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"diffusion": {"deadline_ms": 0}}, "diffusion.deadline_ms"),
    ],
)
def test_what_is_refused(change: dict[str, Any], param: str, server: Running) -> None:
    asked = {"messages": MESSAGES, **change}
    response = httpx2.post(f"{server.url}/v1/chat/completions", json=asked, timeout=PATIENCE)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_a_deadline_ends_with_the_newest_draft(path: str, server: Running) -> None:
    slow = {"confidence_threshold": 0, "max_denoising_steps": 1000, "deadline_ms": 300}
    asked = {"messages": MESSAGES} if "chat" in path else {"input": PUZZLE}
    response = httpx2.post(f"{server.url}/v1/{path}", json=asked | {"diffusion": slow}, timeout=PATIENCE).json()
    if "chat" in path:
        (choice,) = response["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["diffusion"]["finish_reason"] == "deadline"
        assert choice["message"]["content"]
    else:
        assert (response["status"], response["incomplete_details"]["reason"]) == ("incomplete", "max_output_tokens")
    assert 0 < response["usage"]["diffusion"]["denoising_steps"] < 1000


def test_nothing_is_left(server: Running) -> None:
    server.wait_until_empty()
