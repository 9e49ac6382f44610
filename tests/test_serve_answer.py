"""Answers by themselves: what a canvas or a draft adds to one, with stop strings, characters of several tokens, and a
suffix behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dgemma_ext as dg
from chats import answering
from dgemma_ext.engine import TokenizedPrompt
from dgemma_ext.sampling import TokenLogprobs
from dgemma_ext.serve.answer import Answer
from dgemma_ext.serve.drafts import draft_fields, whole_text
from models import random_model
from serving import MESSAGES, MODEL, Running, running

MODEL_OF_BYTES = random_model(max_positions=2048)
assert MODEL_OF_BYTES.tokenizer is not None
TOKENIZER = MODEL_OF_BYTES.tokenizer
END = TOKENIZER.id_of("<turn|>")
SCHEDULER = dg.Scheduler(MODEL_OF_BYTES, 1)


def request_of(limit: int = 100) -> dg.Request:
    sampler = dg.SamplerConfig(eos_token_ids=[END]).resolve(MODEL_OF_BYTES.defaults, 8)
    nothing: Any = SCHEDULER.step
    prompt = TokenizedPrompt([1])
    return dg.Request(0, prompt, MODEL_OF_BYTES.config.vocab_size, limit, sampler, 0, None, TOKENIZER, cancel=nothing)


def commits(ids: Sequence[int], cuts: Sequence[int]) -> list[dg.Commit]:
    """An answer of these ids, whose canvases end at the cuts."""
    request = request_of()
    found, begin = [], 0
    for end in (*cuts, len(ids)):
        canvas = tuple(ids[begin:end])
        request.token_ids += canvas
        request.finish_reason = "eos" if end == len(ids) else None
        text, thinking = request.new_words()
        logprobs = tuple(TokenLogprobs(-1.0, (), ()) for _ in canvas)
        found.append(dg.Commit(request, len(found), canvas, text, 1, request.finish_reason, thinking, logprobs))
        begin = end
    return found


def draft(text: str, limit: int = 100) -> dg.Draft:
    """A draft that ends within its canvas."""
    ids = TOKENIZER.encode(f"{text}<turn|>???", special_tokens="tokens")
    zeros = torch.zeros(len(ids), device="cpu", dtype=torch.float32)
    return dg.Draft(request_of(limit), 0, 1, tuple(ids), zeros > 0, zeros, 0.0)


@given(st.text("ab€😀", min_size=1, max_size=12), st.text("ab€😀", min_size=1, max_size=3), st.data())
def test_log_probabilities_are_told_with_their_text(text: str, stop: str, data: st.DataObject) -> None:
    """Tokens of a character come with it, and those of what may become a stop string not before it is text."""
    ids = [*TOKENIZER.encode(text), END]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids) - 1), max_size=3)))
    answer, told = Answer(TOKENIZER, [1], [stop]), 0
    for commit in commits(ids, cuts):
        told += len(answer.commit(commit).tokens)
        begun = [one for one in answer.tokens if one.offset < len(answer.text)]
        assert answer.tokens == begun, "a token is told before its text"
        assert TOKENIZER.decode([one.id for one in begun]) == answer.text
        if answer.finish_reason is not None:
            break
    assert told == len(answer.tokens)
    assert answer.text == text.partition(stop)[0]
    # Every character here but the first two of the alphabet is a token for each of its bytes.
    places = [place for place, character in enumerate(answer.text) for _ in character.encode()]
    assert [one.offset for one in answer.tokens] == places


def test_a_draft_says_where_the_answer_ends() -> None:
    answer = Answer(TOKENIZER, [1])
    ended = draft_fields(draft("one"), answer, TOKENIZER)
    length = len(TOKENIZER.encode("one"))
    assert (ended["end"], ended["text"]) == (length + 1, "one")
    assert [place for place, token in enumerate(ended["tokens"]) if token.get("ends")] == [length]
    limited = draft_fields(draft("one", limit=2), answer, TOKENIZER)
    assert limited["end"] == 2
    assert not any("ends" in token for token in limited["tokens"])


def test_a_draft_is_cut_as_its_answer_will_be() -> None:
    """At a stop string, a part of which may stand in the canvas before; and in front of a suffix."""
    answer = Answer(TOKENIZER, [1], ["bc"])
    first, _ = commits(TOKENIZER.encode("ab") + TOKENIZER.encode("cd"), [len(TOKENIZER.encode("ab"))])
    answer.commit(first)
    assert (answer.text, answer.text_of(draft("cd")), answer.text_of(draft("xd"))) == ("a", "", "bxd")
    assert whole_text(answer, draft("xbcd")) == "abx"
    assert (answer.text, answer.finish_reason) == ("a", None), "a draft has changed the answer"
    middle = Answer(TOKENIZER, [1], middle=2)
    told = draft_fields(draft("onetwo"), middle, TOKENIZER)
    assert told["text"] == TOKENIZER.decode(TOKENIZER.encode("onetwo")[:2])
    assert told["end"] == 2


def test_a_middle_that_its_deadline_cut_says_so() -> None:
    for reason, told in (("deadline", "length"), ("length", "stop"), ("eos", "stop")):
        answer = Answer(TOKENIZER, [1], middle=2)
        (whole,) = commits(TOKENIZER.encode("onetwo"), [])
        answer.commit(dg.Commit(whole.request, 0, whole.token_ids, whole.text, 1, reason))
        assert answer.finish_reason == told
        assert answer.engine_reason == ("deadline" if reason == "deadline" else "eos")


@pytest.fixture
def server() -> Any:
    with running(MODEL_OF_BYTES) as started:
        yield started


def test_nothing_follows_a_stop_string(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is read late finds further drafts of the answer in its mailbox: they stand behind its end."""
    length = MODEL_OF_BYTES.config.canvas_length
    answering(monkeypatch, "stop" + "a" * 3 * length, "b" * 3 * length)
    put = server.service.engine._deliver
    kept: list[Any] = []

    def late(events: list[Any]) -> None:
        """Hands everything over at the end, as to a coroutine that has had no turn."""
        kept.extend(events)
        ends = [event for _, event in kept if isinstance(event, dg.Commit) and event.finish_reason is not None]
        if not any(isinstance(event, dg.Commit | dg.Draft) for _, event in events) or len(ends) == 2:
            put(list(kept))
            kept.clear()

    monkeypatch.setattr(server.service.engine, "_deliver", late)
    asked: Any = {"diffusion": {"max_denoising_steps": 2, "drafts": True}}
    seen: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in server.client().chat.completions.create(
        model=MODEL, messages=MESSAGES, n=2, stop="top", max_tokens=3 * length, stream=True, extra_body=asked
    ):
        for choice in chunk.choices:
            seen[choice.index].append(choice)
    for index, text in enumerate(("s", "b" * 3 * length)):
        assert "".join(choice.delta.content or "" for choice in seen[index]) == text
        assert [choice.finish_reason is not None for choice in seen[index]].index(True) == len(seen[index]) - 1
