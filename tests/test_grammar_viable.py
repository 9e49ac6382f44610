"""What pinned and allowed tokens leave of a grammar, against walking all tokens of all positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_ext as dg
from dgemma_ext.sampling import FAILED, AnswerShape, CompiledGrammar, grammars_of_canvases
from dgemma_ext.sampling.grammar import compile_pattern, pattern, vocabulary_of
from dgemma_ext.sampling.grammar.thinking import closing_distances

PAD, END, OPEN, CLOSE = range(4)
TEXTS = [None, None, None, None, b"a", b"b", b"c", b"ab", b"bc"]
VOCABULARY = vocabulary_of(TEXTS, [PAD, END, OPEN, CLOSE], len(TEXTS))
MARKERS = {"<|channel>": OPEN, "<channel|>": CLOSE}
CANVAS = 3

EXPRESSIONS = ["(a|bc)*", "a{2,5}b*", "(ab|c)*a", "[ab]*c?", "(?:a(?:b|c)a)*", "b|(?:ab){2}c*", "[abc]{7}"]
_tokens = st.integers(0, len(TEXTS) - 1)


@st.composite
def contents(draw: st.DrawFn, positions: int) -> dg.Canvas:
    """Some positions are pinned, and at some only some tokens are allowed; as dg.Canvas.check would have it."""
    tokens: list[Any] = draw(st.lists(st.none() | _tokens, max_size=positions))
    pinned = [token is not None and draw(st.booleans()) for token in tokens]
    one = st.lists(_tokens, min_size=2, max_size=5, unique=True)
    allowed: Any = draw(st.none() | one | st.lists(st.none() | one, min_size=1, max_size=positions))
    if allowed and not isinstance(allowed[0], int):
        for position, ids in enumerate(allowed[: len(tokens)]):
            if ids is not None and pinned[position]:
                allowed[position] = [*ids, tokens[position]]
    elif allowed:
        allowed = sorted({*allowed, *(token for token, pin in zip(tokens, pinned, strict=True) if pin)})
    return dg.Canvas(tokens, pinned, allowed)


def with_thought(answer: pattern.Pattern, kind: str) -> pattern.Pattern:
    content = pattern.repeat(pattern.characters("abc"))
    thought = pattern.concat(pattern.symbol(OPEN), content, pattern.literal("c"), pattern.symbol(CLOSE))
    before = {"none": pattern.EMPTY, "optional": pattern.optional(thought), "required": thought}[kind]
    return pattern.concat(before, answer)


def goes_on(grammar: CompiledGrammar, content: dg.Canvas, state: int, begin: int, shape: AnswerShape) -> bool:
    """Whether a text that has led to `state` can end, by sets of states."""
    longest, positions, budget = shape.longest, shape.canvas_ends[-1], shape.thinking_budget

    def passes(q: int, at: int) -> bool:
        return budget is None or grammar.closing is None or grammar.closing[q] in range(max(budget - at, 0) + 1)

    states = {state} if passes(state, begin) else set()
    for position in range(begin, positions):
        ids: Any = content.allowed_at(position) or range(len(TEXTS))
        if position >= longest:
            ids = [PAD, END]
        if position < len(content.tokens) and content.pinned and content.pinned[position]:
            ids = [content.tokens[position]]
        states = {grammar.after(one, token) for one in states for token in ids} - {FAILED}
        states = {one for one in states if passes(one, position + 1)}
    return any(grammar.distance[one] == 0 for one in states)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.data(),
    st.sampled_from(EXPRESSIONS),
    st.integers(1, 9),
    st.sampled_from(["none", "optional", "required"]),
    st.none() | st.integers(3, 10),
)
def test_what_goes_on_is_what_some_tokens_lead_on(
    data: st.DataObject, expression: str, longest: int, thought: str, budget: int | None
) -> None:
    answer = with_thought(dg.Regex(expression).pattern(), thought)
    grammar = compile_pattern(answer, VOCABULARY, [END], PAD)
    grammar = replace(grammar, closing=closing_distances(grammar, MARKERS))
    assert (grammar.closing is None) == (thought == "none")
    ends = [*range(CANVAS, longest, CANVAS), -(-longest // CANVAS) * CANVAS]
    content = data.draw(contents(ends[-1]))
    shape = AnswerShape(longest, ends, [PAD, END], budget)
    found = grammars_of_canvases(grammar, grammar.start, content, shape)
    is_restricted = any(content.pinned or ()) or any(content.allowed_at(p) is not None for p in range(ends[-1]))
    # Without restrictions the distances tell it.
    is_in_time = budget is None or grammar.closing is None or grammar.closing[grammar.start] <= budget
    if is_restricted or (grammar.shortest <= longest and is_in_time):
        whole = goes_on(grammar, content, grammar.start, 0, shape)
        assert (found is not None) == whole
    for end in ends if found is not None else ():
        assert found is not None
        within = found.get(end, grammar).distance <= max(longest - end, 0)
        if budget is not None and grammar.closing is not None:  # as a step has it, at the end of its canvas
            within &= (grammar.closing == 0) | (grammar.closing <= budget - end)
        expected = [goes_on(grammar, content, q, end, shape) for q in range(grammar.states)]
        np.testing.assert_array_equal(within, expected)
