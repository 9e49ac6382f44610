"""/v1/chat/completions with OpenAI's own client: whole answers and streams of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from serving import MESSAGES, MODEL, SAMPLER, Running, bundled, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(bundled()) as started:
        yield started


def test_an_answer_is_the_models_own(server: Running) -> None:
    wanted = server.model.generate(MESSAGES, seed=7, sampler=SAMPLER)
    completion = server.client().chat.completions.create(model=MODEL, messages=MESSAGES, seed=7)
    (choice,) = completion.choices
    assert choice.message.content == wanted.text
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert completion.model == MODEL
    usage = completion.usage
    assert usage is not None
    assert usage.completion_tokens == len(wanted.token_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    told: Any = usage.model_extra
    assert told["diffusion"]["denoising_steps"] == sum(wanted.denoising_steps)
    assert told["diffusion"]["seeds"] == [7]


def test_a_stream_says_the_same(server: Running) -> None:
    client = server.client()
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=7, n=2)
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    for chunk in client.chat.completions.create(
        model=MODEL, messages=MESSAGES, seed=7, n=2, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index] == choice.finish_reason


@pytest.mark.parametrize("helper", [False, True])
def test_drafts_are_chunks_that_say_nothing_to_who_does_not_know_them(helper: bool, server: Running) -> None:
    client = server.client()
    asked: Any = {"model": MODEL, "messages": MESSAGES, "seed": 7, "extra_body": {"diffusion": {"drafts": True}}}
    wanted = server.model.generate(MESSAGES, seed=7, sampler=SAMPLER)
    if helper:
        with client.chat.completions.stream(**asked) as stream:
            for _ in stream:
                pass
            assert stream.get_final_completion().choices[0].message.content == wanted.text
        return
    text, drafts = "", []
    for chunk in client.chat.completions.create(**asked, stream=True):
        text += chunk.choices[0].delta.content or ""
        extra: Any = chunk.model_extra
        if "diffusion" in extra:
            drafts.append(extra["diffusion"])
    assert text == wanted.text
    assert [draft["step"] for draft in drafts] == list(range(1, wanted.denoising_steps[0] + 1))
    assert drafts[-1]["text"] == wanted.text
    assert len(drafts[0]["tokens"]) == server.model.config.canvas_length
    assert {"id", "text", "accepted", "entropy"} <= drafts[0]["tokens"][0].keys()


def test_models(server: Running) -> None:
    (model,) = server.client().models.list().data
    assert model.id == MODEL
    assert server.client().models.retrieve(MODEL).id == MODEL


def test_nothing_is_left(server: Running) -> None:
    server.wait_until_empty()
