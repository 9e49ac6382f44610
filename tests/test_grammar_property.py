"""Grammars against whatever: random expressions over hostile logits and tight budgets, random schemas and instances of
them, and what is refused wherever it stands."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dgemma_ext as dg
from backend import BACKEND
from dgemma_ext import demo
from dgemma_ext.ops import denoise
from dgemma_ext.sampling import step
from grammar_cases import accepts, compiled, expressions, record
from test_grammar_schema import REFUSED

PROMPT = demo.draw(6, 1).text
FAST = {"max_denoising_steps": 3, "confidence_threshold": 0.0}


@pytest.fixture(scope="module")
def model() -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")


def hostile_logits(kind: str, rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    """[rows, vocabulary]: all alike, one token of each row far above, or noise of a few tokens that always win while
    the ends of text never do."""
    if kind == "flat":
        return torch.zeros(rows, vocabulary)
    logits = torch.randn(rows, vocabulary, generator=random) * 3
    favoured = torch.randint(vocabulary, (rows if kind == "peaked" else 3,), generator=random)
    if kind == "peaked":
        logits[torch.arange(rows), favoured] = 75.0
    else:
        logits[:, favoured] = 75.0
        logits[:, [0, 1, 50, 106]] = -75.0
    return logits


@pytest.mark.skipif(BACKEND != "cpu", reason="grammars are on the CPU alone")
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    expression=expressions(),
    kind=st.sampled_from(["flat", "peaked", "hostile"]),
    repeats=st.integers(1, 6),
    canvas_length=st.integers(2, 5),
    slack=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_an_answer_matches_whatever_the_logits_say(
    expression: str,
    kind: str,
    repeats: int,
    canvas_length: int,
    slack: int,
    seed: int,
    model: dg.DiffusionGemma,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Canvases are short, so that an answer has one to several; slack: tokens above the shortest text."""
    expression = f"(?:{expression}c){{{repeats},}}"
    random = torch.Generator().manual_seed(seed)

    def head(hidden: Any, embedding: Any, *, logits: torch.Tensor, out: Any, **params: Any) -> None:
        rows = hostile_logits(kind, logits.shape[0] * logits.shape[1], logits.shape[2], random)
        logits.copy_(rows.view(logits.shape))
        denoise.vocabulary_statistics(logits, **params, out=out)

    grammar = dg.Regex(expression)
    budget = max(1, model.compile(grammar).shortest + slack)
    sampler = dg.SamplerConfig(canvas_length=canvas_length, **FAST)
    with monkeypatch.context() as patch:
        patch.setattr(step, "vocabulary_head", head)
        out = model.generate(PROMPT, budget, sampler, seed, grammar=grammar)
    assert len(out.token_ids) <= budget
    assert re.fullmatch(expression, out.text), out.text


@settings(max_examples=len(REFUSED), deadline=None, derandomize=True)
@given(what=st.sampled_from(sorted(REFUSED)), containers=st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_what_is_refused_is_named_wherever_it_stands(what: str, containers: list[int]) -> None:
    schema, pointer, keyword = REFUSED[what]
    if "$ref" in json.dumps(schema) or keyword == "oneOf":
        return  # a reference is one into the whole schema
    for container in containers:
        schema, before = [
            (record(["a"], **{"b": {"type": "null"}, "a": schema}), "/properties/a"),
            ({"type": "array", "items": schema, "minItems": 1}, "/items"),
            ({"anyOf": [{"type": "null"}, schema]}, "/anyOf/1"),
            ({"type": "array", "prefixItems": [True, schema]}, "/prefixItems/1"),
        ][container]
        pointer = before + pointer
    with pytest.raises(dg.GrammarError) as caught:
        dg.JsonSchema(schema).pattern()
    assert (caught.value.pointer, caught.value.keyword) == (pointer, keyword)


_texts = st.text('ab"\\é日😀\n', max_size=4)
# A schema, and instances of it.
_plain: list[tuple[Any, st.SearchStrategy[Any]]] = [
    ({"type": "integer", "minimum": -3, "maximum": 40}, st.integers(-3, 40)),
    ({"type": "integer"}, st.integers(-(10**17), 10**17)),
    ({"type": "number", "minimum": 0, "exclusiveMaximum": 3}, st.integers(0, 299).map(lambda n: n / 100)),
    ({"type": "string", "maxLength": 4}, _texts),
    ({"type": "string", "minLength": 2, "maxLength": 5}, st.text("a\té", min_size=2, max_size=5)),
    ({"type": "string", "pattern": "^a+b?$"}, st.from_regex("^a+b?\\Z")),
    ({"type": "string", "format": "date"}, st.dates(date(1000, 1, 1)).map(str).filter(lambda day: day[5:] != "02-29")),
    ({"type": ["null", "boolean"]}, st.sampled_from([None, True, False])),
    ({"enum": [1, "x", None, [True], {"k": 2}]}, st.sampled_from([1, "x", None, [True], {"k": 2}])),
]  # fmt: skip
_Drawn = tuple[Any, st.SearchStrategy[Any]]


def _object_of(parts: list[_Drawn]) -> _Drawn:
    """Of the properties p0, p1, ...; those with an odd number may be left out."""
    properties = {f"p{number}": schema for number, (schema, _) in enumerate(parts)}
    schema = record([name for name in properties if int(name[1:]) % 2 == 0], **properties)
    required = {f"p{number}": values for number, (_, values) in enumerate(parts) if number % 2 == 0}
    optional = {f"p{number}": values for number, (_, values) in enumerate(parts) if number % 2}
    drawn = st.fixed_dictionaries(required, optional=optional)
    return schema, drawn.map(lambda value: {name: value[name] for name in properties if name in value})


def _array_of(part: _Drawn) -> _Drawn:
    schema, values = part
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": 3}, st.lists(values, min_size=1, max_size=3)


def _one_of(parts: list[_Drawn]) -> _Drawn:
    return {"anyOf": [schema for schema, _ in parts]}, st.one_of(*(values for _, values in parts))


_schemas_with_values = st.recursive(
    st.sampled_from(_plain),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(_object_of)
        | inner.map(_array_of)
        | st.lists(inner, min_size=1, max_size=2).map(_one_of)
    ),
    max_leaves=4,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(_schemas_with_values, st.data())
def test_valid_values_are_accepted_as_they_are_usually_written(drawn: _Drawn, data: st.DataObject) -> None:
    schema, values = drawn
    value = data.draw(values)
    jsonschema.validate(value, schema)
    grammar = compiled(dg.JsonSchema(schema))
    for layout in ({}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}):
        text = json.dumps(value, **layout)  # type: ignore[arg-type]
        assert accepts(grammar, text) or "\\ud" in text, text
