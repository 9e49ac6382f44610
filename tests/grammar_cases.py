"""A vocabulary for tests of grammars, JSON schemas with instances, and random walks through compiled grammars."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from hypothesis import strategies as st

from dgemma_ext.sampling.grammar import CompiledGrammar, Grammar, compile_pattern, vocabulary_of
from dgemma_ext.sampling.grammar.pattern import Pattern

PAD, END, OPEN, CLOSE = 0, 1, 2, 3
SPECIAL = [PAD, END, OPEN, CLOSE]


def make_texts(words: int = 1200, seed: int = 0) -> list[bytes | None]:
    """The bytes of a vocabulary: special tokens, all single bytes, pieces of JSON and of words, and duplicates."""
    random.seed(seed)
    letters = [
        "a",
        "e",
        "in",
        "st",
        "er",
        "o",
        " t",
        "th",
        "né",
        "日",
        "😀",
        "0",
        "1",
        "23",
        '"',
        '": ',
        "{",
        "}",
        ", ",
    ]
    pieces = [
        '{"',
        '"}',
        '", "',
        '":',
        "},\n",
        "\n  ",
        "[]",
        "true",
        "false",
        "null",
        "-1",
        "0.5",
        "\\n",
        "\\u00",
        "e+",
    ]
    made = {"".join(random.choices(letters, k=random.randint(2, 4))) for _ in range(words)}
    texts = [bytes([byte]) for byte in range(256)] + [text.encode() for text in (*pieces, *sorted(made))]
    return [None] * len(SPECIAL) + texts + texts[100:120]


TEXTS = make_texts()
VOCABULARY = vocabulary_of(TEXTS, SPECIAL, len(TEXTS) + 7)


def compiled(grammar: Grammar | Pattern, pad: int | None = PAD) -> CompiledGrammar:
    pattern = grammar.pattern() if isinstance(grammar, Grammar) else grammar
    return compile_pattern(pattern, VOCABULARY, [END], pad)


def text_of(tokens: list[int]) -> bytes:
    return b"".join(TEXTS[token] or b"" for token in tokens if token not in SPECIAL)


def random_walk(grammar: CompiledGrammar, seed: int, wander: int = 40) -> list[int]:
    """Tokens of a text: any that the grammar goes on with at first, then those that lead to its end."""
    rng, state, tokens = random.Random(seed), grammar.start, list[int]()
    ids_of_class: dict[int, list[int]] = {}
    for token, of in enumerate(grammar.classes.tolist()):
        ids_of_class.setdefault(of, []).append(token)
    while True:
        if grammar.distance[state] == 0 and (len(tokens) >= wander or rng.random() < 0.1):
            return tokens
        arcs = range(grammar.out_begin[state], grammar.out_begin[state + 1])
        arcs = [arc for arc in arcs if grammar.out_target[arc] != grammar.end]
        if len(tokens) >= wander:
            arcs = [arc for arc in arcs if grammar.distance[grammar.out_target[arc]] < grammar.distance[state]]
        if not arcs:
            return tokens
        arc = rng.choice(arcs)
        of = grammar.out_set[arc]
        classes = grammar.set_class[grammar.set_begin[of] : grammar.set_begin[of + 1]]
        tokens.append(rng.choice([token for one in classes.tolist() for token in ids_of_class.get(one, [])]))
        state = int(grammar.out_target[arc])


def expressions() -> st.SearchStrategy[str]:
    """Regular expressions that Python's re reads as the grammars do."""
    atoms = st.sampled_from(
        ["a", "b", "[ab]", "[^a]", "é", "[à-ü]", "日", ".", "0", r"\n", r"\d", r"[^\W1]", r"\S", "(?s:.)"]
    )
    return st.recursive(
        atoms,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3).map("".join)
            | st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})")
            | inner.map(lambda part: f"(?:{part})*")
            | st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
                lambda t: f"(?:{t[0]}){{{t[1]},{t[1] + t[2]}}}"
            )
        ),
        max_leaves=6,
    )


def spelled(text: str | bytes) -> list[int]:
    """The text in single bytes."""
    return [len(SPECIAL) + byte for byte in (text.encode() if isinstance(text, str) else text)]


def accepts(grammar: CompiledGrammar, text: str | bytes) -> bool:
    state = grammar.walk(grammar.start, spelled(text))
    return state >= 0 and grammar.distance[state] == 0


def arcs_by_target(grammar: CompiledGrammar) -> set[tuple[int, int, int]]:
    sources = np.repeat(np.arange(grammar.states), np.diff(grammar.in_begin))
    return set(zip(grammar.in_source.tolist(), sources.tolist(), grammar.in_set.tolist(), strict=True))


def arcs_by_source(grammar: CompiledGrammar) -> set[tuple[int, int, int]]:
    sources = np.repeat(np.arange(grammar.states), np.diff(grammar.out_begin))
    return set(zip(sources.tolist(), grammar.out_target.tolist(), grammar.out_set.tolist(), strict=True))


def record(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


_TEXT, _COUNT = {"type": "string"}, {"type": "integer"}
_ADDRESS = record(street=_TEXT, city=_TEXT, zip={"type": "string", "pattern": "^[0-9]{5}$"})
_NODE = record(v=_COUNT, kids={"type": "array", "items": {"$ref": "#/$defs/node"}})


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    return record(tool={"const": name}, args=record(**arguments))


# Name → a schema and a valid instance.
SCHEMAS: dict[str, tuple[Any, Any]] = {
    "person": (record(name=_TEXT, age=_COUNT, active={"type": "boolean"}), {"name": "Zoë", "age": 7, "active": True}),
    "classify": (
        record(
            category={"enum": ["none", "spam", "other"]},
            severity={"enum": [1, 2, 3]},
            reason={"type": "string", "maxLength": 30},
        ),
        {"category": "spam", "severity": 2, "reason": 'a "quoted" line\n'},
    ),
    "invoice": (
        record(
            id={"type": "string", "pattern": "^INV-[0-9]{6}$"},
            date={"type": "string", "format": "date"},
            total={"type": "number"},
            customer=record(name=_TEXT, email={"type": "string", "format": "email"}, address=_ADDRESS),
            lines={"type": "array", "items": record(sku=_TEXT, qty=_COUNT), "minItems": 1},
        ),
        {
            "id": "INV-000123",
            "date": "2026-11-30",
            "total": 12.5e3,
            "customer": {
                "name": "A",
                "email": "a.b@c-d.example",
                "address": {"street": "1", "city": "日", "zip": "12345"},
            },
            "lines": [{"sku": "x", "qty": 0}, {"sku": "y", "qty": -3}],
        },
    ),
    "optional": (record(["title"], summary=_TEXT, title=_TEXT, author=_TEXT, url=_TEXT), {"title": "t", "url": "u"}),
    "tool call": (
        {"anyOf": [_call("weather", city=_TEXT, days=_COUNT), _call("search", query=_TEXT)]},
        {"tool": "search", "args": {"query": "x"}},
    ),
    "times": (
        record(id={"type": "string", "format": "uuid"}, at={"type": "string", "format": "date-time"}),
        {"id": "0b9c3c5e-1111-4222-8333-944455556666", "at": "2024-02-28T23:59:59.5+01:00"},
    ),
    "list": (
        record(words={"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 2, "maxItems": 5}),
        {"words": ["a", "", "12345678"]},
    ),
    "bounded": (
        record(
            score={"type": "integer", "minimum": -20, "maximum": 105},
            ratio={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        ),
        {"score": -20, "ratio": 0.5},
    ),
    "recursive": ({"$defs": {"node": _NODE}, "$ref": "#/$defs/node"}, {"v": 1, "kids": [{"v": 2, "kids": []}]}),
    "any": ({"type": "object"}, {"a": [1, None, {"b": "c"}], "": False}),
    "flat": (record(**{f"f{i}": [_TEXT, _COUNT, {"type": ["null", "boolean"]}][i % 3] for i in range(12)}), None),
    "tuple": (
        {"type": "array", "prefixItems": [_COUNT, _TEXT], "items": False, "minItems": 2},
        [5, "five"],
    ),
    "map": ({"type": "object", "additionalProperties": {"type": "number", "minimum": 2}}, {"k": 2.0, "l": 1234.5}),
    "apart": ({"oneOf": [_TEXT, _COUNT, record(k={"const": 1}), record(k={"const": 2}, z=_TEXT)]}, {"k": 2, "z": ""}),
}  # fmt: skip
