"""Thoughts before the answer of a grammar: which are taken, and that they are closed within their budget."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_ext as dg
from backend import BACKEND
from chats import LOOK
from command import dgemma
from dgemma_ext import demo
from dgemma_ext.sampling import FAILED, Canvas
from dgemma_ext.sampling.grammar import compile_pattern, pattern, vocabulary_of
from dgemma_ext.sampling.grammar.thinking import closing_distances
from grammar_cases import SCHEMAS
from grammar_steps import CANVAS, answer, flat, hostile, ids_of, marker, tokenizer
from models import random_model

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="grammars are on the CPU alone")

THINK = "<|think|>"
OPEN, CLOSE = "<|channel>", "<channel|>"
FAST = dg.SamplerConfig(max_denoising_steps=2)
SCHEMA = SCHEMAS["bounded"][0]


def never_closing(random: np.random.Generator, length: int, vocabulary: int) -> np.ndarray:
    """Logits of a model that wants to think for ever."""
    found = random.standard_normal((length, vocabulary))
    found[:, marker(CLOSE)] -= 40
    return found


def parts(tokens: list[int]) -> tuple[list[int], list[int]]:
    """The thought with its markers, and what follows it."""
    if marker(OPEN) not in tokens:
        return [], tokens
    end = tokens.index(marker(CLOSE)) + 1
    assert tokens[0] == marker(OPEN)
    return tokens[:end], tokens[end:]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from([5, 12, CANVAS - 1, CANVAS, CANVAS + 1, 31, 2 * CANVAS, 57]),
    st.sampled_from([0, 1, 9, 40]),
    st.sampled_from(["required", "auto"]),
    st.sampled_from([never_closing, hostile, flat]),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_thought_is_closed_within_its_budget_and_the_answer_within_all(
    budget: int, room: int, thinking: str, logits: Any, drawn: bool, seed: int
) -> None:
    budget = max(budget, len(ids_of(f"{OPEN}thought\n{CLOSE}")))
    grammar = dg.JsonSchema(SCHEMA, "compact", thinking=thinking, thinking_budget=budget)
    shortest = len(ids_of('{"score":0,"ratio":1}'))
    tokens = answer(grammar, budget + shortest + room, seed, logits, THINK, drawn)
    thought, rest = parts(tokens)
    assert len(thought) <= budget
    assert thought or thinking == "auto"
    assert (marker(OPEN) in rest, marker(CLOSE) in rest) == (False, False)
    jsonschema.validate(json.loads(tokenizer().decode(rest)), SCHEMA)


def test_a_model_that_would_think_for_ever_uses_its_budget_and_no_more() -> None:
    """Over canvases; an answer that may be long has all that is left."""
    for budget in (20, CANVAS, 40, 3 * CANVAS - 1):
        grammar = dg.Regex("[ab]{30,}", thinking="required", thinking_budget=budget)
        tokens = answer(grammar, budget + 30, 3, never_closing)
        thought, rest = parts(tokens)
        assert budget - 2 <= len(thought) <= budget
        assert len(thought) + len(rest) == budget + 30


def test_without_a_budget_a_thought_leaves_room_for_the_answer() -> None:
    thought, rest = parts(answer(dg.Regex("[ab]{7}", thinking="required"), 60, 1, never_closing))
    assert (len(thought), len(rest)) == (53, 7)


@pytest.mark.parametrize(
    ("thinking", "prompt", "takes"),
    [
        ("auto", "", [True, True, False]),
        ("auto", THINK, [True, True, True]),
        ("none", THINK, [True, True, False]),
        ("required", "", [False, True, True]),
        ("required", THINK, [False, True, True]),
    ],
)
def test_which_thoughts_are_taken(thinking: str, prompt: str, takes: list[bool]) -> None:
    """No thought, the empty one that models write, and a thought."""
    grammar = dg.Choice(["yes"], thinking=thinking)
    compiled = dg.sampling.compile_grammar(grammar, tokenizer(), tokenizer().vocab_size, (106,), 0, bool(prompt))
    for text, taken in zip(("", f"{OPEN}thought\n{CLOSE}", f"{OPEN}thought\nHm.\n{CLOSE}"), takes, strict=True):
        state = compiled.walk(compiled.start, ids_of(text + "yes"))
        assert (state != FAILED and compiled.distance[state] == 0) == taken, text
    begun = f"{OPEN}thought\n{CLOSE}"
    assert compiled.walk(compiled.start, ids_of(begun + begun)) == FAILED
    assert compiled.walk(compiled.start, tokenizer().encode(begun)) == FAILED  # spelled as text
    tokens = answer(grammar, 40, 5, flat, prompt)
    assert tokenizer().parse_response(tokens).text == "yes"


def test_a_thought_that_the_prompt_has_begun_goes_on() -> None:
    prompt, grammar = f"{OPEN}thought\n", dg.Choice(["yes"], thinking_budget=9)
    tokens = answer(grammar, 30, 2, never_closing, prompt)
    assert tokens.index(marker(CLOSE)) in (7, 8)
    assert tokenizer().parse_response(tokens, prefix=ids_of(prompt)).text == "yes"
    none = answer(dg.Choice(["yes"], thinking="none"), 30, 2, never_closing, prompt)
    assert none[0] == marker(CLOSE)
    with pytest.raises(dg.GrammarError, match="does not go on with the thought or the tool call"):
        answer(grammar, 30, 2, flat, "<|tool_call>call:")
    assert parts(answer(grammar, 30, 2, flat, f"{OPEN}thought\n{CLOSE}"))[0] == []


def test_a_model_whose_template_has_no_thoughts_writes_no_empty_ones() -> None:
    other = dg.Tokenizer.from_directory(demo.checkpoint(6))
    assert (tokenizer().knows_thoughts, other.knows_thoughts) == (True, False)
    compiled = dg.sampling.compile_grammar(dg.Choice(["yes"]), other, other.vocab_size, (106,), 0)
    assert compiled.after(compiled.start, other.markers[OPEN]) == FAILED
    thinking = dg.sampling.compile_grammar(dg.Choice(["yes"]), other, other.vocab_size, (106,), 0, thinks=True)
    assert thinking.after(thinking.start, other.markers[OPEN]) != FAILED


def test_the_command_bounds_a_thought() -> None:
    command = [
        "generate",
        "6x6",
        demo.draw(6, 1).text,
        "--device",
        "cpu",
        "--max-new-tokens",
        "60",
        "--steps",
        "2",
        "--json",
    ]
    for more in (["--choice", "yes"], []):
        run = dgemma(*command, "--thinking", "--thinking-budget", "14", *more)
        assert run.code == 0, run.err
        thought, _ = parts(run.object["token_ids"])
        assert len(thought) <= 14
        assert run.object.get("choices") == ({"yes": 1.0} if more else None)


def test_budgets_that_cannot_be_kept() -> None:
    shortest = len(ids_of(f"{OPEN}thought\n{CLOSE}"))
    for grammar, message in (
        (dg.Choice(["yes"], thinking="required", thinking_budget=shortest - 1), f"thought has {shortest} tokens"),
        (dg.Choice(["yes"], thinking="required"), f"max_new_tokens is {shortest}, and the shortest text"),
    ):
        with pytest.raises(ValueError, match=message):
            answer(grammar, shortest if grammar.thinking_budget is None else 60, 1, flat)
    for wrong, message in (
        ({"thinking": "yes"}, "thinking must be one of"),
        ({"thinking_budget": 0}, "thinking_budget"),
    ):
        for make in (lambda **t: dg.Regex("a", **t), lambda **t: dg.ToolCalls([LOOK], **t)):
            with pytest.raises(ValueError, match=message):
                make(**wrong)


def test_a_model_without_markers_writes_no_thoughts() -> None:
    vocabulary = vocabulary_of([None, None, b"a"], [0, 1], 3)
    of_thought = dg.sampling.grammar.thinking.with_thought
    for markers in ({}, {OPEN: 2}, {OPEN: 70_000, CLOSE: 70_001}):
        assert of_thought(pattern.literal("a"), "auto", True, markers) == pattern.literal("a")
    assert closing_distances(compile_pattern(pattern.literal("a"), vocabulary, [1], 0), {}) is None
    with pytest.raises(dg.GrammarError, match="thinking is required, and the tokenizer has no"):
        of_thought(pattern.literal("a"), "required", True, {})


def test_thinking_in_the_engine_alone_and_in_a_batch() -> None:
    """With a chat template that lets the model think, over canvases of 8 tokens."""
    model = random_model()
    grammars = [
        dg.JsonSchema({"type": "array", "items": {"type": "boolean"}}, thinking_budget=18),
        dg.Choice(["left", "right"], thinking_budget=30),
        dg.Regex("[0-9]{3}"),
        dg.ToolCalls([LOOK], "required", thinking="required", thinking_budget=20),
    ]
    thinks = [True, True, False, True]
    prompts = [[{"role": "user", "content": f"hi {number}"}] for number in range(4)]
    given = {"max_new_tokens": 70, "sampler": FAST}
    together = model.generate(prompts, seed=[1, 2, 3, 4], enable_thinking=thinks, grammar=grammars, **given)
    for index, out in enumerate(together):
        asked = {"enable_thinking": thinks[index], "grammar": grammars[index]}
        alone = model.generate(prompts[index], seed=index + 1, **asked, **given)
        assert alone.token_ids == out.token_ids
        budget = grammars[index].thinking_budget
        ids, close = list(out.token_ids), model.tokenizer.id_of(CLOSE)  # type: ignore[union-attr]
        assert budget is None or (ids.index(close) < budget if close in ids else not out.thinking)
    assert isinstance(together[0].parsed, list)
    assert together[1].parsed in ("left", "right")
    assert together[2].thinking == ""
    assert together[3].tool_calls
    assert CLOSE not in "".join(out.text for out in together)


def test_a_turn_that_goes_on_after_a_tool_s_result_goes_on_with_its_thought() -> None:
    """The template then begins the thought itself."""
    model = random_model()
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"what": "x"}}}]},
        {"role": "tool", "content": "blue"},
    ]
    given = {"max_new_tokens": 40, "sampler": FAST, "enable_thinking": True}
    out = model.generate(messages, grammar=dg.Choice(["yes", "no"], thinking_budget=12), **given)
    assert model.tokenizer is not None
    assert list(out.token_ids).index(model.tokenizer.id_of(CLOSE)) < 12
    assert out.parsed in ("yes", "no")
    assert sum(out.choices.values()) == pytest.approx(1)


def test_pins_of_a_thought_that_leave_no_time_to_close_it_are_refused() -> None:
    model = random_model()
    ids = model.tokenizer.encode(f"{OPEN}thought\nHmmmmm", special_tokens="tokens")  # type: ignore[union-attr]
    canvas = Canvas(tokens=ids, pinned=[True] * len(ids))
    given = {"max_new_tokens": 60, "sampler": FAST, "canvas": canvas, "enable_thinking": True}
    for budget, is_enough in ((len(ids), False), (len(ids) + 1, True)):
        grammar = dg.Choice(["yes"], thinking_budget=budget)
        if is_enough:
            assert model.generate("hi", grammar=grammar, **given).parsed == "yes"
        else:
            with pytest.raises(dg.GrammarError, match="canvas has pinned"):
                model.generate("hi", grammar=grammar, **given)
