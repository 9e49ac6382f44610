"""JSON schemas as grammars, with jsonschema and llguidance as judges: what they accept is valid, what they refuse is
named."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_ext as dg
from grammar_cases import SCHEMAS, accepts, compiled, random_walk, record, text_of
from schema_strategies import schemas


class _Bytes:
    """A tokenizer of bytes, as llguidance wants one."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [bytes([byte]) for byte in range(256)] + [b"<|end|>"]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@cache
def _judge_tokenizer() -> Any:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))


def judge(schema: Any, text: bytes) -> None:
    """llguidance takes fewer spellings of a value (no escapes of letters, no trailing zeros): it gets the usual one."""
    value = json.loads(text)
    jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
    usual = json.dumps(value, ensure_ascii=False)
    if re.search(r"\de[+-]", usual) and not re.search(rb"\de[+-]", text):
        return  # 0.000001 becomes 1e-06, which is no number of a range there
    matcher = llguidance.LLMatcher(
        _judge_tokenizer(), llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    )
    assert not matcher.is_error(), matcher.get_error()
    assert matcher.consume_tokens(list(usual.encode())), text
    assert matcher.is_accepting(), text


@pytest.mark.parametrize("whitespace", ["flexible", "compact"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_random_walks_are_valid(name: str, whitespace: str) -> None:
    schema, _ = SCHEMAS[name]
    grammar = compiled(dg.JsonSchema(schema, whitespace))
    texts = {text_of(random_walk(grammar, seed, wander=5 + 8 * seed)) for seed in range(12)}
    assert len(texts) > 1
    for text in texts:
        judge(schema, text)


@pytest.mark.parametrize("name", [name for name in SCHEMAS if SCHEMAS[name][1] is not None])
def test_valid_instances_are_accepted_as_they_are_usually_written(name: str) -> None:
    schema, instance = SCHEMAS[name]
    grammar = compiled(dg.JsonSchema(schema))
    for layout in ({}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}):
        text = json.dumps(instance, **layout)  # type: ignore[arg-type]
        assert accepts(grammar, text), text
        assert not accepts(grammar, text[:-1])
        assert not accepts(grammar, text + "x")
    assert accepts(compiled(dg.JsonSchema(schema, "compact")), json.dumps(instance, separators=(",", ":")))


def test_the_order_of_properties_and_their_number() -> None:
    grammar = compiled(dg.JsonSchema(record(["b"], a={"const": 1}, b={"const": 2}, c={"const": 3})))
    for text in ('{"b":2}', '{"a":1,"b":2}', '{"b":2,"c":3}', '{"a":1, "b":2, "c":3}'):
        assert accepts(grammar, text)
    for text in ("{}", '{"a":1}', '{"b":2,"a":1}', '{"b":2,}', '{,"b":2}', '{"b":2,"b":2}', '{"a":1 "b":2}'):
        assert not accepts(grammar, text)


@pytest.mark.parametrize(("least", "most"), [(0, 0), (-7, 13), (95, 205), (-120, -98), (None, 3), (1000, None), (9, 9)])
def test_integers_between(least: int | None, most: int | None) -> None:
    bounds = {"minimum": least, "maximum": most}
    schema = {"type": "integer", **{name: bound for name, bound in bounds.items() if bound is not None}}
    grammar = compiled(dg.JsonSchema(schema))
    for number in range(-230, 1100):
        within = (least is None or number >= least) and (most is None or number <= most)
        assert accepts(grammar, str(number)) == within, number
    for text in ("007", "+1", "1.0", "", "-", "1e1"):
        assert not accepts(grammar, text)


@pytest.mark.parametrize(
    "bounds",
    [
        {"minimum": 0, "maximum": 1},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"minimum": -3, "exclusiveMaximum": 2},
        {"exclusiveMinimum": -10, "maximum": -9},
        {"exclusiveMinimum": -1},
        {"maximum": 0},
        {"minimum": 2, "exclusiveMinimum": 2, "maximum": 12, "exclusiveMaximum": 20},
    ],
)
def test_numbers_between(bounds: dict[str, int]) -> None:
    schema = {"type": "number", **bounds}
    grammar = compiled(dg.JsonSchema(schema))
    validator = jsonschema.Draft202012Validator(schema)
    for number in range(-12_000, 21_000, 125):
        text = f"{number / 1000:g}"
        assert accepts(grammar, text) == validator.is_valid(float(text)), text
    for bound in bounds.values():
        for text in (str(bound), f"{bound}.0", f"{bound - 1}.999999", f"{bound}.000001"):
            if accepts(grammar, text):
                assert validator.is_valid(json.loads(text)), text


def test_counts_of_a_string_are_its_characters() -> None:
    schema = {"type": "string", "minLength": 2, "maxLength": 3}
    grammar = compiled(dg.JsonSchema(schema))
    for text in ('"ab"', '"日本語"', '"😀a"', r'"\n\""', r'"A\/"'):
        assert accepts(grammar, text), text
        jsonschema.validate(json.loads(text), schema)
    for text in ('"a"', '"abcd"', '"😀"', r'"😀"', '"ab', '"a\nb"'):
        assert not accepts(grammar, text), text


def test_a_pattern_matches_anywhere_and_is_escaped() -> None:
    grammar = compiled(dg.JsonSchema({"type": "string", "pattern": 'a"\\\\b'}))
    assert accepts(grammar, r'"a\"\\b"')
    assert accepts(grammar, r'"xx\na\"\\b \u0001"')
    assert not accepts(grammar, '"a\\"b"')
    anchored = compiled(dg.JsonSchema({"type": "string", "pattern": "^(yes|no)$"}))
    assert accepts(anchored, '"yes"')
    assert not accepts(anchored, '"yes!"')


def test_annotations_say_nothing() -> None:
    plain = record(id={"type": "null"})
    notes = {"$schema": "http://json-schema.org/draft-04/schema#", "id": "https://x.example/s", "title": "t"}
    assert dg.JsonSchema(plain | notes).pattern() == dg.JsonSchema(plain).pattern()


def test_properties_that_may_be_added_are_not() -> None:
    plain = record(a={"type": "null"})
    assert dg.JsonSchema(plain | {"additionalProperties": True}).pattern() == dg.JsonSchema(plain).pattern()


def test_a_type_beside_alternatives_of_that_type() -> None:
    schema = {
        "$defs": {"name": {"type": "string", "maxLength": 3}},
        "type": ["object", "number", "string"],
        "anyOf": [record(a={"const": 1}), {"type": "integer"}, {"$ref": "#/$defs/name", "type": "string"}],
    }
    grammar = compiled(dg.JsonSchema(schema))
    assert all(accepts(grammar, text) for text in ('{"a":1}', "7", '"abc"'))
    assert not any(accepts(grammar, text) for text in ("null", "7.5", '"abcd"'))
    for narrower in ("object", ["object", "integer"], ["object", "string"]):
        with pytest.raises(dg.GrammarError) as caught:
            dg.JsonSchema(schema | {"type": narrower}).pattern()
        assert (caught.value.pointer, caught.value.keyword) == ("", "type")
    for malformed in (
        {"type": {}, "anyOf": [True]},
        {"type": "null", "anyOf": [{"enum": 3}]},
        {"type": "null", "anyOf": [3]},
    ):
        with pytest.raises(dg.GrammarError):
            dg.JsonSchema(malformed).pattern()


def test_recursion_is_unrolled_to_a_depth() -> None:
    schema = {
        "$defs": {"list": {"anyOf": [{"const": 0}, record(next={"$ref": "#/$defs/list"})]}},
        "$ref": "#/$defs/list",
    }
    for depth in (1, 2, 4):
        grammar = compiled(dg.JsonSchema(schema, "compact", max_depth=depth))
        for nested in range(6):
            assert accepts(grammar, '{"next":' * nested + "0" + "}" * nested) == (nested < depth)
    endless = {"$defs": {"x": record(next={"$ref": "#/$defs/x"})}, "$ref": "#/$defs/x"}
    with pytest.raises(dg.GrammarError, match="no value ends within the recursion depth 3; raise max_depth"):
        dg.JsonSchema(endless).pattern()


# What is refused: a schema, the JSON pointer and the keyword that the error names.
REFUSED: dict[str, tuple[Any, str, str]] = {
    "not": ({"not": {"type": "string"}}, "", "not"),
    "if": (record(a={"type": "string", "if": {}}), "/properties/a", "if"),
    "uniqueItems": ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "", "uniqueItems"),
    "contains": ({"type": "array", "contains": {}}, "", "contains"),
    "dependentRequired": ({**record(a={"type": "null"}), "dependentRequired": {}}, "", "dependentRequired"),
    "unevaluatedProperties": ({**record(), "unevaluatedProperties": False}, "", "unevaluatedProperties"),
    "propertyNames": ({"type": "object", "propertyNames": {}}, "", "propertyNames"),
    "patternProperties": ({"type": "object", "patternProperties": {}}, "", "patternProperties"),
    "minProperties": ({"type": "object", "minProperties": 1}, "", "minProperties"),
    "two of allOf": ({"allOf": [{"type": "string"}, {"minLength": 1}]}, "", "allOf"),
    "beside anyOf": ({"anyOf": [{"type": "string"}], "minLength": 2}, "", "minLength"),
    "beside enum": (record(a={"enum": ["x"], "maxLength": 2}), "/properties/a", "maxLength"),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, "", "multipleOf"),
    "multipleOf of numbers": ({"type": "number", "multipleOf": 1}, "", "multipleOf"),
    "half a bound": ({"type": "number", "minimum": 0.5}, "", "minimum"),
    "bounds without numbers": ({"type": "integer", "minimum": 3, "maximum": 2}, "", "minimum and maximum"),
    "remote reference": (record(**{"a/b": {"$ref": "https://x.example/s"}}), "/properties/a~1b", "$ref"),
    "reference to nothing": ({"$ref": "#/$defs/x"}, "", "$ref"),
    "reference to itself": ({"$ref": "#"}, "", "$ref"),
    "unknown keyword": ({"type": "string", "x-note": 1}, "", "x-note"),
    "unknown type": ({"type": "text"}, "", "type"),
    "unknown format": ({"type": "string", "format": "uri"}, "", "format"),
    "pattern and length": ({"type": "string", "pattern": "a", "maxLength": 3}, "", "maxLength"),
    "look-around": (record(a={"type": "string", "pattern": "(?=a)b"}), "/properties/a", "pattern"),
    "additionalProperties": ({**record(a={"type": "null"}), "additionalProperties": {}}, "", "additionalProperties"),
    "required of nothing": (record(["b"], a={"type": "null"}), "", "required"),
    "overlap of oneOf": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "", "oneOf"),
    "items after prefixItems": ({"type": "array", "prefixItems": [True], "items": True}, "", "items"),
    "lengths": ({"type": "string", "minLength": 4, "maxLength": 3}, "", "minLength"),
    "a long string": ({"type": "string", "maxLength": 10**6}, "", "maxLength"),
    "enum of another type": ({"type": "integer", "enum": ["a"]}, "", "enum"),
    "without a type": ({"minimum": 3}, "", "minimum"),
    "in an alternative": ({"anyOf": [True, {"type": "array", "items": {"not": {}}}]}, "/anyOf/1/items", "not"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_ruled_is_refused_with_its_path(what: str) -> None:
    schema, pointer, keyword = REFUSED[what]
    with pytest.raises(dg.GrammarError) as caught:
        dg.JsonSchema(schema).pattern()
    if what == "reference to itself":
        assert caught.value.keyword in (keyword, None)
        return
    assert (caught.value.pointer, caught.value.keyword) == (pointer, keyword)
    assert str(caught.value).startswith(f"#{pointer}: {keyword}: ")


def test_schemas_that_are_too_large_or_no_schemas() -> None:
    with pytest.raises(dg.GrammarError, match="more than the limit of 1000000; shorten it"):
        dg.JsonSchema({"type": "string", "description": "x" * 10_000_000}).pattern()
    with pytest.raises(dg.GrammarError, match="is not JSON"):
        dg.JsonSchema("{").pattern()
    with pytest.raises(dg.GrammarError, match="is not JSON"):
        dg.JsonSchema({"const": object()})
    with pytest.raises(dg.GrammarError, match="must be a schema that allows a value"):
        dg.JsonSchema(False).pattern()
    deep: Any = {"type": "null"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    with pytest.raises(dg.GrammarError, match="nested deeper"):
        dg.JsonSchema(deep).pattern()
    with pytest.raises(ValueError, match="whitespace must be one of flexible, compact"):
        dg.JsonSchema(True, whitespace="none")
    with pytest.raises(dg.GrammarError, match="lower maxLength"):
        compiled(dg.JsonSchema({"type": "array", "items": {"type": "string", "maxLength": 5000}, "maxItems": 50}))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(schemas, st.integers(0, 1000))
def test_any_schema_gives_valid_texts(schema: Any, seed: int) -> None:
    text = text_of(random_walk(compiled(dg.JsonSchema(schema)), seed, wander=30))
    judge(schema, text)
    assert re.search(rb"\n {13}", text) is None
