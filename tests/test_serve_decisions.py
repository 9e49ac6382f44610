"""/v1/decisions: the engine's own decisions, and what cannot be decided."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from dgemma_ext import demo
from serving import MODEL, Running, bundled, running

PROMPTS = [demo.draw(6, seed).text for seed in range(3)]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(bundled(), max_batch=4, max_waiting=4) as started:
        yield started
        started.wait_until_empty()


def ask(server: Running, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/decisions", json={"choices": ["1", "2"], **body}, timeout=60)


def test_decisions_are_the_engines(server: Running) -> None:
    choices = {"low": ["1", "2"], "high": ["5", "6"]}
    body = ask(server, model=MODEL, input=PROMPTS, choices=choices, template="3{}", seed=7).json()
    wanted = server.model.decide(PROMPTS, choices, "3{}", seed=7)
    assert [(one["index"], one["choice"]) for one in body["data"]] == [(i, one.choice) for i, one in enumerate(wanted)]
    assert [one["probabilities"] for one in body["data"]] == [one.probabilities for one in wanted]
    assert [one["mass"] for one in body["data"]] == [one.mass for one in wanted]
    assert [one["denoising_steps"] for one in body["data"]] == [1, 1, 1]
    assert body["object"] == "decisions"
    assert body["usage"]["diffusion"]["denoising_steps"] == 3


def test_a_chat_a_text_and_no_seed(server: Running) -> None:
    text = ask(server, input=PROMPTS[0]).json()["data"]
    chat = ask(server, messages=[{"role": "user", "content": PROMPTS[0]}], seed=0).json()["data"]
    assert text == chat
    assert text[0]["probabilities"] == server.model.decide(PROMPTS[0], ["1", "2"]).probabilities
    long = ask(server, input=PROMPTS[0], template="x" * 31 + "{}", canvas_length=37).json()["data"]
    wanted = server.model.decide(PROMPTS[0], ["1", "2"], "x" * 31 + "{}", 37)
    assert long[0]["probabilities"] == wanted.probabilities


def test_decisions_and_answers_share_the_engine(server: Running) -> None:
    def answer(seed: int) -> str:
        chat = server.client().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": PROMPTS[seed]}], seed=seed
        )
        return chat.choices[0].message.content or ""

    def decision(seed: int) -> Any:
        return ask(server, input=PROMPTS[seed], seed=seed).json()["data"]

    calls = [(kind, seed) for seed in range(3) for kind in (answer, decision)]
    in_turn = [kind(seed) for kind, seed in calls]
    with ThreadPoolExecutor(len(calls)) as threads:
        assert list(threads.map(lambda call: call[0](call[1]), calls)) == in_turn


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({}, "input", "either input or messages"),
        ({"input": "1", "messages": [{"role": "user", "content": "1"}]}, "input", "either input or messages"),
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "string"),
        ({"input": [3]}, "input", "string"),
        ({"input": ["1"] * 9}, "input", "8 texts"),
        ({"input": "1" * 2000}, "input", "room"),
        ({"input": "1", "choices": ["1"]}, "choices", "at least 2"),
        ({"input": "1", "choices": ["1", "yes"]}, "choices", "3 tokens"),
        ({"input": "1", "choices": ["1", "1"]}, "choices", "more than once"),
        ({"input": "1", "choices": {"a": "1", "b": "1"}}, "choices", "share"),
        ({"input": "1", "choices": {"a": "1", "b": ""}}, "choices", "not empty"),
        ({"input": "1", "choices": "12"}, "choices", "list"),
        ({"input": "1", "template": "x"}, "template", "once"),
        ({"input": "1", "template": "x" * 40 + "{}"}, "template", "37 positions"),
        ({"input": "1", "canvas_length": 38}, "canvas_length", "at most 37"),
        ({"input": "1", "canvas_length": 0}, "canvas_length", "greater"),
        ({"input": "1", "seed": 1.5}, "seed", "integer"),
        ({"input": "1", "stream": True}, "stream", "False"),
        ({"messages": [{"role": "wizard", "content": "1"}]}, "messages[0].role", "wizard"),
        (
            {"input": "1", "chat_template_kwargs": {"enable_thinking": 3}},
            "chat_template_kwargs.enable_thinking",
            "true",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_decided(change: dict[str, Any], param: str, said: str, server: Running) -> None:
    response = ask(server, **change)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert said in error["message"]


def test_another_model_is_not_served(server: Running) -> None:
    assert ask(server, model="other", input="1").status_code == 404
