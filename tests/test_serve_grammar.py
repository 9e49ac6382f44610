"""Answers of the server that match what a request asks for: JSON schemas, expressions and choices."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

import dgemma_ext as dg
from serving import MODEL, Running, bundled, running

MESSAGES: Any = [{"role": "user", "content": "1.3.5."}]
SCHEMA = {
    "type": "object",
    "properties": {"solved": {"type": "boolean"}, "blanks": {"type": "integer", "minimum": 0, "maximum": 36}},
    "required": ["solved", "blanks"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "board", "schema": SCHEMA, "strict": True}}
SETTINGS: Any = {"model": MODEL, "max_tokens": 60, "seed": 3}


class Board(BaseModel):
    solved: bool
    size: Literal["small", "large"]
    blanks: int | None


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(bundled(), max_batch=4) as started:
        yield started
        started.wait_until_empty()


def alone(server: Running, grammar: dg.Regex | dg.JsonSchema | dg.Choice, seed: int = 3) -> str:
    """The engine's own answer with the server's settings."""
    sampler = dg.SamplerConfig(trim_canvas=True)
    prompt = [{"role": "user", "content": MESSAGES[0]["content"]}]
    out = server.model.generate(prompt, max_new_tokens=60, sampler=sampler, seed=seed, grammar=grammar)
    return str(out.text)


def test_a_chat_answers_by_a_schema(server: Running) -> None:
    answer = server.client().chat.completions.create(messages=MESSAGES, response_format=FORMAT, **SETTINGS)
    text = answer.choices[0].message.content
    assert text is not None
    jsonschema.validate(json.loads(text), SCHEMA)
    assert answer.choices[0].finish_reason == "stop"
    assert text == alone(server, dg.JsonSchema(SCHEMA))


def test_a_stream_says_the_same(server: Running) -> None:
    chunks = server.client().chat.completions.create(
        messages=MESSAGES, response_format=FORMAT, stream=True, extra_body={"diffusion": {"drafts": True}}, **SETTINGS
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == alone(server, dg.JsonSchema(SCHEMA))


def test_the_client_parses_its_own_models(server: Running) -> None:
    client = server.client()
    chat = client.chat.completions.parse(messages=MESSAGES, response_format=Board, **SETTINGS)
    assert isinstance(chat.choices[0].message.parsed, Board)
    response = client.responses.parse(
        model=MODEL, input="1.3.5.", max_output_tokens=60, text_format=Board, extra_body={"seed": 3}
    )
    assert isinstance(response.output_parsed, Board)
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_schema"


@pytest.mark.parametrize(
    ("structure", "grammar"),
    [
        ({"regex": "[A-F]{2}[0-9]{4}"}, dg.Regex("[A-F]{2}[0-9]{4}")),
        ({"choice": ["spam", "ham"]}, dg.Choice(["spam", "ham"])),
        ({"json": SCHEMA}, dg.JsonSchema(SCHEMA)),
        ({"json": json.dumps(SCHEMA), "regex": None}, dg.JsonSchema(json.dumps(SCHEMA))),
    ],
    ids=str,
)
def test_structured_outputs_as_vllm_spells_them(
    structure: dict[str, Any], grammar: dg.Regex | dg.Choice | dg.JsonSchema, server: Running
) -> None:
    client, body = server.client(), {"structured_outputs": structure}
    chat = client.chat.completions.create(messages=MESSAGES, extra_body=body, **SETTINGS)
    assert chat.choices[0].message.content == alone(server, grammar)
    text = client.completions.create(prompt="1.3.5.", extra_body=body, **SETTINGS).choices[0].text
    if isinstance(grammar, dg.Regex):
        assert re.fullmatch(grammar.expression, text)
    elif isinstance(grammar, dg.Choice):
        assert text in grammar.choices
    else:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_any_object(server: Running) -> None:
    for asked in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        answer = server.client().chat.completions.create(messages=MESSAGES, extra_body=asked, **SETTINGS)
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
    assert (
        server.client().chat.completions.create(messages=MESSAGES, response_format={"type": "text"}, **SETTINGS) != ""
    )


def test_requests_with_and_without_grammars_share_the_engine(server: Running) -> None:
    client = server.client()
    structures = [None, {"regex": "[0-9]{3}"}, {"choice": ["yes", "no"]}, {"json": SCHEMA}] * 3

    def ask(numbered: tuple[int, dict[str, Any] | None]) -> str:
        seed, structure = numbered
        asked = {} if structure is None else {"structured_outputs": structure}
        answer = client.chat.completions.create(messages=MESSAGES, extra_body=asked, **SETTINGS | {"seed": seed})
        return answer.choices[0].message.content or ""

    numbered = list(enumerate(structures))
    in_turn = [ask(one) for one in numbered]
    with ThreadPoolExecutor(len(numbered)) as threads:
        assert list(threads.map(ask, numbered)) == in_turn
    assert all(re.fullmatch("[0-9]{3}", text) for text in in_turn[1::4])


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            "not",
        ),
        ({"structured_outputs": {"json": {"items": {"uniqueItems": True}}}}, "structured_outputs.json", "/items"),
        ({"structured_outputs": {"json": {"$ref": "https://a/b"}}}, "structured_outputs.json", "$ref"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex", "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "(a{900}){900}"}}, "structured_outputs.regex", "lower"),
        ({"structured_outputs": {"regex": "(?:a|b)*a(?:a|b){24}"}}, "structured_outputs.regex", "too many states"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "empty"),
        ({"structured_outputs": {"choice": "yes"}}, "structured_outputs.choice", "list"),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format",
            "both",
        ),
        ({"structured_outputs": {"regex": "[0-9]{61}"}}, "max_tokens", "61"),
        (
            {
                "structured_outputs": {"regex": "[0-9]*"},
                "diffusion": {"start_text": [{"blank": 2}, {"text": "a", "pinned": True}]},
            },
            "diffusion",
            "pinned",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_matched_is_refused_by_name(
    asked: dict[str, Any], param: str, said: str, server: Running
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(messages=MESSAGES, extra_body=asked, **SETTINGS)
    assert caught.value.param == param
    assert said in caught.value.message


def test_a_large_schema_is_refused(server: Running) -> None:
    large = {"type": "string", "description": "x" * 2_000_000}
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(
            messages=MESSAGES, extra_body={"structured_outputs": {"json": large}}, **SETTINGS
        )
    assert caught.value.param == "structured_outputs.json"
    assert "more than the limit of 1000000" in caught.value.message
    assert len(caught.value.message) < 300


def test_a_suffix_has_no_grammar(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(
            prompt="1", suffix="2", extra_body={"structured_outputs": {"regex": "a"}}, **SETTINGS
        )
    assert caught.value.param == "suffix"
