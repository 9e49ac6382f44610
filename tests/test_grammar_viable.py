"""What pinned and allowed tokens leave of a grammar, against walking all tokens of all positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_ext as dg
from dgemma_ext.sampling import FAILED, AnswerShape, CompiledGrammar, grammars_of_canvases
from dgemma_ext.sampling.grammar import compile_pattern, vocabulary_of

PAD, END = 0, 1
TEXTS = [None, None, b"a", b"b", b"c", b"ab", b"bc"]
VOCABULARY = vocabulary_of(TEXTS, [PAD, END], len(TEXTS))
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


def goes_on(grammar: CompiledGrammar, content: dg.Canvas, state: int, begin: int, longest: int, positions: int) -> bool:
    """Whether a text that has led to `state` can end, by sets of states."""
    states = {state}
    for position in range(begin, positions):
        ids: Any = content.allowed_at(position) or range(len(TEXTS))
        if position >= longest:
            ids = [PAD, END]
        if position < len(content.tokens) and content.pinned and content.pinned[position]:
            ids = [content.tokens[position]]
        states = {grammar.after(one, token) for one in states for token in ids} - {FAILED}
    return any(grammar.distance[one] == 0 for one in states)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(EXPRESSIONS), st.integers(1, 9))
def test_what_goes_on_is_what_some_tokens_lead_on(data: st.DataObject, expression: str, longest: int) -> None:
    grammar = compile_pattern(dg.Regex(expression).pattern(), VOCABULARY, [END], PAD)
    ends = [*range(CANVAS, longest, CANVAS), -(-longest // CANVAS) * CANVAS]
    content = data.draw(contents(ends[-1]))
    shape = AnswerShape(longest, ends, [PAD, END])
    found = grammars_of_canvases(grammar, grammar.start, content, shape)
    is_restricted = content.allowed is not None or any(content.pinned or ())
    if is_restricted or grammar.shortest <= longest:
        whole = goes_on(grammar, content, grammar.start, 0, longest, ends[-1])
        assert (found is not None) == whole
    for end in ends if found is not None else ():
        assert found is not None
        distance = found.get(end, grammar).distance
        left = max(longest - end, 0)
        expected = [goes_on(grammar, content, q, end, longest, ends[-1]) for q in range(grammar.states)]
        np.testing.assert_array_equal(distance <= left, expected)
