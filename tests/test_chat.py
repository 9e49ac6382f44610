"""Conversations: turns, snapshots, and interrupted turns."""

from __future__ import annotations

import pytest

import dgemma_ext as dg
from models import random_model

SAMPLER = dg.SamplerConfig(max_denoising_steps=2)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens that each pass encoded."""
    counts: list[int] = []
    original = dg.Cache.advance

    def spy(self: dg.Cache, slot: int, count: int) -> None:
        counts.append(count)
        original(self, slot, count)

    monkeypatch.setattr(dg.Cache, "advance", spy)
    return counts


def test_a_turn_encodes_only_what_is_new(encoded: list[int]) -> None:
    model = random_model()
    assert model.tokenizer is not None
    chat = model.chat(system="Be brief.", max_length=400)
    chat.send("Hello there, how are you today?", max_new_tokens=6, sampler=SAMPLER, seed=1)
    first = encoded[0]
    encoded.clear()
    chat.send("And you?", max_new_tokens=6, sampler=SAMPLER, seed=2)
    whole = len(model.tokenizer.encode_prompt(chat.messages[:-1]))
    assert sum(encoded) == whole - first


def test_snapshots_change_no_token() -> None:
    model = random_model()
    chat = model.chat(max_length=400)
    answers = [chat.send(text, max_new_tokens=20, sampler=SAMPLER, seed=i) for i, text in enumerate("abc")]
    for turn, answer in enumerate(answers):
        fresh = model.generate(chat.messages[: 2 * turn + 1], max_new_tokens=20, sampler=SAMPLER, seed=turn)
        assert fresh.text == answer
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3


def test_a_turn_that_is_left_early_is_taken_back() -> None:
    model = random_model()
    chat = model.chat(max_length=400)
    chat.send("first", max_new_tokens=8, sampler=SAMPLER)
    before = list(chat.messages)
    turn = chat.stream("second", max_new_tokens=8, sampler=SAMPLER)
    next(turn)
    turn.close()
    assert chat.messages == before
    assert chat.send("third", max_new_tokens=8, sampler=SAMPLER) == chat.messages[-1]["content"]


def test_a_chat_without_a_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        model.chat()
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        model.generate("text")


def test_a_turn_that_was_left_early_gives_the_next_one_no_events() -> None:
    chat = random_model().chat()
    first = chat.stream("hello", max_new_tokens=16, sampler=SAMPLER)
    next(first)
    second = [event.request for event in chat.stream("again", max_new_tokens=8, sampler=SAMPLER)]
    assert len({id(request) for request in second}) == 1
