"""Scores of choices against the enumeration of all canvases, and in the engine."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import dgemma_ext as dg
from backend import BACKEND
from dgemma_ext import demo
from dgemma_ext.sampling import choice_scores, spellings_of, tokenizer_vocabulary
from dgemma_ext.sampling.grammar import vocabulary_of

PAD, END, STOP = 0, 1, 2
TEXTS = [None, None, None, b"a", b"b", b"ab", b"a"]  # two tokens write the same
VOCABULARY = vocabulary_of(TEXTS, [PAD, END, STOP], len(TEXTS))
SPELL = partial(spellings_of, vocabulary=VOCABULARY)
LENGTH = 4
CHOICES = ["a", "ab", "abb", "", "bbbb", "abab", "babab"]
FAST = dg.SamplerConfig(max_denoising_steps=3)


def enumerated(
    logits: np.ndarray, choices: list[str], content: dg.Canvas, room: int, pad: int | None
) -> dict[str, float]:
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    masses = dict.fromkeys(choices, 0.0)
    for word in itertools.product(range(len(TEXTS)), repeat=LENGTH):
        end = next((index for index, token in enumerate(word) if token in (END, STOP)), LENGTH)
        text = b"".join(TEXTS[token] or b"\0" for token in word[:end]).decode()
        tail = word[end + 1 :]
        if text not in masses or end > room or (pad is not None and any(token != pad for token in tail)):
            continue
        log = 0.0
        for position, token in enumerate(word):
            allowed = content.allowed_at(position)
            if content.pinned and position < len(content.pinned) and content.pinned[position]:
                log += 0.0 if token == content.tokens[position] else -math.inf
            elif allowed is None:
                log += logs[position, token]
            else:
                mass = np.logaddexp.reduce(logs[position, list(allowed)])
                log += logs[position, token] - mass if token in allowed else -math.inf
        masses[text] += math.exp(log)
    total = sum(masses.values())
    return {choice: mass / total if total else 0.0 for choice, mass in masses.items()}


@pytest.mark.parametrize("pad", [PAD, None])
def test_scores_are_the_mass_of_all_spellings(pad: int | None) -> None:
    random = np.random.default_rng(3)
    contents = [
        dg.Canvas(),
        dg.Canvas([None, 4], [False, True]),
        dg.Canvas(allowed=[None, [3, 4, END], [0, 4, 6, STOP]]),
        dg.Canvas([3, 5, END, PAD], [True, False, True, True]),
    ]
    for scale, content, room in itertools.product((0.3, 4.0, 30.0), contents, (LENGTH, 2)):
        logits = random.standard_normal((LENGTH, len(TEXTS))) * scale
        given: Any = (torch.from_numpy(logits), 0.0, content, 0, room, [END, STOP], pad)
        texts = {choice: choice.encode() for choice in CHOICES}
        found = choice_scores(texts, SPELL, *given)
        wanted = enumerated(logits.astype(np.float32).astype(np.float64), CHOICES, content, room, pad)
        assert found == pytest.approx(wanted, abs=2e-6), (scale, content, room)
        assert sum(found.values()) == pytest.approx(1 if sum(wanted.values()) else 0)


def test_the_softcap_and_what_an_answer_has_said_already() -> None:
    logits = torch.randn(LENGTH, len(TEXTS), generator=torch.Generator().manual_seed(1)) * 9
    rest: dict[str, bytes | None] = {"xa": b"a", "xb": b"b", "y": None}
    given: Any = (dg.Canvas(), 7, LENGTH, [END], PAD)
    found = choice_scores(rest, SPELL, logits, 5.0, *given)
    capped = 5.0 * torch.tanh(logits / 5.0)
    assert found == pytest.approx(choice_scores(rest, SPELL, capped, 0.0, *given), abs=1e-6)
    assert found["y"] == 0
    assert found["xa"] + found["xb"] == pytest.approx(1)


@pytest.mark.skipif(BACKEND != "cpu", reason="grammars are on the CPU alone")
def test_an_answer_has_the_scores_of_its_last_step() -> None:
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")
    assert model.tokenizer is not None
    prompts = [demo.draw(6, seed).text for seed in range(3)]
    grammars = [dg.Choice(["1", "2", "3"]), dg.Choice(["left", "right and more", "x" * 40]), dg.Regex("[ab]")]
    given = {"max_new_tokens": 60, "sampler": FAST, "logprobs": 20}
    together = model.generate(prompts, seed=[1, 2, 3], grammar=grammars, **given)
    for index, out in enumerate(together):
        alone = model.generate(prompts[index], seed=index + 1, grammar=grammars[index], **given)
        assert alone.choices == out.choices
    digits, words, none = together
    assert none.choices is None
    for out in (digits, words):
        assert out.parsed in out.choices
        assert sum(out.choices.values()) == pytest.approx(1)
    # Of texts of one token the score is their probability where they stand, given that it is one of them.
    vocabulary = tokenizer_vocabulary(model.tokenizer, model.config.vocab_size)
    ids = {digit: vocabulary.ids_of(digit.encode()) for digit in "123"}
    scheduler = dg.Scheduler(model, max_batch=1)
    wanted = tuple(token for found in ids.values() for token in found)
    given = {"max_new_tokens": 60, "sampler": FAST}
    request = scheduler.submit(prompts[0], seed=1, grammar=grammars[0], logprob_token_ids=wanted, **given)
    while not request.done:
        scheduler.finish_canvas()
    first = request.output.logprobs[0]
    of_id = {token: math.exp(value) for token, value in zip(first.top_ids, first.top_logprobs, strict=True)}
    weights = {digit: sum(of_id[token] for token in found) for digit, found in ids.items()}
    shares = {digit: weight / sum(weights.values()) for digit, weight in weights.items()}
    assert digits.choices == pytest.approx(shares, rel=1e-4)
    # One canvas has 37 positions. Those of the first have decided between x and y.
    long = model.generate(prompts[0], grammar=dg.Choice(["x" * 40, "x" * 41, "y" * 40, "y" * 41]), **given)
    assert long.choices[long.parsed] > 0
    assert all((score > 0) == (text[0] == long.parsed[0]) for text, score in long.choices.items())


@pytest.mark.skipif(BACKEND != "cpu", reason="grammars are on the CPU alone")
def test_scores_are_those_of_the_answer_behind_a_thought() -> None:
    from models import random_model

    out = random_model().generate(
        "hi",
        max_new_tokens=50,
        sampler=FAST,
        enable_thinking=True,
        grammar=dg.Choice(["left", "right"], thinking="required", thinking_budget=20),
    )
    assert out.thinking or len(out.token_ids) > 10
    assert out.parsed in ("left", "right")
    assert sum(out.choices.values()) == pytest.approx(1)
