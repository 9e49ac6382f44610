"""Calls that a request holds the model to (tool_choice, strict), formats beside tools and thoughts, and the count of a
thought's tokens. The model is random and would never write any of it by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

import dgemma_ext as dg
from backend import BACKEND
from chats import LOOK, answering, noted, prompts_of
from models import random_model
from serving import MODEL, Running, running

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="grammars are on the CPU alone")

FAST = {"diffusion": {"max_denoising_steps": 2}}
COUNT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "count",
        "parameters": {
            "type": "object",
            "properties": {"from": {"enum": ["a", "b"]}, "to": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["from", "to"],
            "additionalProperties": False,
        },
    },
}
ASKED: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [LOOK, COUNT],
    "max_tokens": 90,
    "seed": 5,
}
SCHEMA = {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "flags", "schema": SCHEMA}}
THOUGHT = "<|channel>thought\nLet me see.\n<channel|>"


def strict(tool: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {**tool["function"], "strict": True, **changes}}


def flat(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as /v1/responses has it."""
    return {"type": "function", **tool["function"]}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(random_model(max_positions=2048)) as started:
        yield started
        started.wait_until_empty()


@pytest.fixture
def grammars(monkeypatch: pytest.MonkeyPatch) -> list[dg.Grammar | None]:
    """The grammars of the requests to come."""
    return noted(monkeypatch, lambda request: request.grammar)


def ask(server: Running, body: dict[str, Any] | None = None, **changes: Any) -> Any:
    asked = {name: value for name, value in (ASKED | changes).items() if value is not None}
    return server.client().chat.completions.create(**asked, extra_body=FAST | (body or {}))


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def check(calls: list[tuple[str, Any]], names: set[str]) -> None:
    assert calls
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (LOOK, COUNT)}
    for name, arguments in calls:
        assert name in names
        jsonschema.validate(arguments, parameters[name])


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"look", "count"}),
        ({"type": "function", "function": {"name": "count"}}, {"count"}),
        ({"type": "function", "function": {"name": "look"}}, {"look"}),
    ],
    ids=["required", "count", "look"],
)
def test_a_choice_of_tools_is_kept(choice: Any, names: set[str], server: Running) -> None:
    for seed in range(3):
        (answer,) = ask(server, tool_choice=choice, seed=seed).choices
        check(calls_of(answer.message), names)
        assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")
    (one,) = ask(server, tool_choice=choice, parallel_tool_calls=False).choices
    assert len(calls_of(one.message)) == 1
    chunks = ask(server, tool_choice=choice, stream=True)
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    told = [(call.function.name, json.loads(call.function.arguments)) for call in deltas]
    assert told == calls_of(ask(server, tool_choice=choice).choices[0].message)


def test_responses_keep_a_choice_of_tools(server: Running) -> None:
    asked: Any = {"model": MODEL, "input": "hi", "tools": [flat(LOOK), flat(COUNT)], "max_output_tokens": 90}
    for choice, names in (("required", {"look", "count"}), ({"type": "function", "name": "count"}, {"count"})):
        response = server.client().responses.create(**asked, tool_choice=choice, extra_body=FAST | {"seed": 2})
        assert {item.type for item in response.output} == {"function_call"}
        check([(item.name, json.loads(item.arguments)) for item in response.output], names)  # type: ignore[union-attr]
        assert json.loads(response.model_dump_json())["tool_choice"] == choice


def test_what_auto_holds_to(server: Running, grammars: list[dg.Grammar | None]) -> None:
    """Strict tools alone make the schemas of calls binding; other requests stay the model's own."""
    ask(server)
    ask(server, tools=[LOOK, strict(COUNT)])
    ask(server, tools=[LOOK, strict(COUNT)], tool_choice="none")
    ask(server, tools=[LOOK, COUNT], parallel_tool_calls=False)
    ask(server, tools=[strict(LOOK, strict=False), strict(COUNT, strict=None)])
    server.client().responses.create(
        model=MODEL, input="hi", tools=[{**flat(COUNT), "strict": True}], max_output_tokens=40, extra_body=FAST
    )
    held = [grammar is not None for grammar in grammars]
    assert held == [False, True, False, False, False, True]
    assert grammars[1] == dg.ToolCalls([LOOK, COUNT])
    assert grammars[5] == dg.ToolCalls([COUNT])


def test_a_schema_that_cannot_be_followed_is_refused_where_it_is_strict(
    server: Running, grammars: list[dg.Grammar | None]
) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    loose = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    (answer,) = ask(server, tools=[loose], tool_choice="required").choices
    assert {name for name, _ in calls_of(answer.message)} == {"f"}
    free = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert grammars == [dg.ToolCalls([free], "required")]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, tools=[strict(loose)], tool_choice="required")
    assert caught.value.param == "tools"
    assert "#/0/function/parameters/properties/a: uniqueItems" in caught.value.message


def test_the_model_is_not_told_of_strict(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(monkeypatch)
    ask(server, tools=[strict(LOOK)], tool_choice="required")
    ask(server, tools=[LOOK])
    assert prompts[0] == prompts[1]


def test_a_format_leaves_tools_to_be_called(server: Running, grammars: list[dg.Grammar | None]) -> None:
    (answer,) = ask(server, response_format=FORMAT).choices
    assert grammars == [dg.ToolCalls([LOOK, COUNT], text=dg.JsonSchema(SCHEMA))]
    if answer.message.tool_calls:
        check(calls_of(answer.message), {"look", "count"})
    else:
        jsonschema.validate(json.loads(answer.message.content or ""), SCHEMA)
    (called,) = ask(server, response_format=FORMAT, tool_choice="required").choices
    check(calls_of(called.message), {"look", "count"})
    (text,) = ask(server, response_format=FORMAT, tool_choice="none").choices
    jsonschema.validate(json.loads(text.message.content or ""), SCHEMA)


def test_a_format_goes_with_thinking(server: Running) -> None:
    for seed in range(3):
        body = {"reasoning_effort": "high", "thinking_token_budget": 20}
        answer = ask(server, body, tools=None, response_format=FORMAT, seed=seed)
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)
        assert answer.choices[0].finish_reason == "stop"
        thought = answer.usage.completion_tokens_details.reasoning_tokens
        assert thought <= 20
        assert (thought > 12) == bool((answer.choices[0].message.model_extra or {}).get("reasoning_content"))
    response = server.client().responses.create(
        model=MODEL,
        input="hi",
        reasoning={"effort": "high"},
        text={"format": {"type": "json_schema", "name": "flags", "schema": SCHEMA}},
        max_output_tokens=60,
        extra_body=FAST | {"thinking_token_budget": 20, "seed": 1},
    )
    jsonschema.validate(json.loads(response.output_text), SCHEMA)


def test_a_budget_of_thoughts_by_itself(server: Running, grammars: list[dg.Grammar | None]) -> None:
    budget = {"reasoning_effort": "high", "thinking_token_budget": 20}
    for seed in range(2):
        answer = ask(server, budget, tools=None, seed=seed)
        assert answer.usage.completion_tokens_details.reasoning_tokens <= 20
        is_long = answer.usage.completion_tokens == 90
        assert answer.choices[0].finish_reason == ("length" if is_long else "stop")
    ask(server, budget)
    assert grammars[1:] == [dg.Regex("(?s:.*)", thinking_budget=20), dg.ToolCalls([LOOK, COUNT], thinking_budget=20)]


@pytest.mark.parametrize(
    ("structure", "limit", "reason"),
    [
        ({"regex": "[ab]{40}[ab]*"}, 40, "length"),
        ({"regex": "[ab]{40}"}, 40, "stop"),
        ({"choice": ["a" * 40, "a" * 41]}, 40, "stop"),
        ({"json": {"type": "integer"}}, 1, "stop"),
    ],
    ids=str,
)
def test_text_that_might_have_gone_on_is_cut_by_its_limit(
    structure: dict[str, Any], limit: int, reason: str, server: Running
) -> None:
    answer = ask(server, {"structured_outputs": structure}, tools=None, max_tokens=limit)
    assert answer.choices[0].finish_reason == reason


@pytest.mark.parametrize("text", ["Yes.", THOUGHT + "Yes.", "<|channel>thought\n<channel|>Yes."])
def test_reasoning_tokens_are_those_of_thoughts(text: str, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, *[text + "<turn|>"] * 3)
    encode = server.service.tokenizer.encode
    wanted = len(encode(text.removesuffix("Yes."), special_tokens="tokens"))
    usage = ask(server, tools=None).usage
    assert usage.completion_tokens_details.reasoning_tokens == wanted
    assert usage.completion_tokens - wanted == len(encode("Yes.")) + 1
    *_, last = ask(server, tools=None, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens_details.reasoning_tokens == wanted
    response = server.client().responses.create(model=MODEL, input="hi", max_output_tokens=90, extra_body=FAST)
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == wanted


@pytest.mark.parametrize(
    ("changes", "body", "param", "said"),
    [
        ({"tool_choice": "always"}, {}, "tool_choice", "must be auto, none, required"),
        ({"tool_choice": "required", "tools": None}, {}, "tool_choice", "there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "see"}}}, {}, "tool_choice", "none of the tools"),
        ({"tool_choice": {"type": "function"}}, {}, "tool_choice", "must be auto, none, required"),
        ({"tool_choice": {"type": "allowed_tools", "tools": []}}, {}, "tool_choice", "must be auto"),
        ({"tool_choice": 3}, {}, "tool_choice", "must be auto"),
        ({"tools": [strict(COUNT, strict="yes")]}, {}, "tools[0].function.strict", "true or false"),
        ({"tools": [LOOK, LOOK], "tool_choice": "required"}, {}, "tools[1].function.name", "a name of its own"),
        ({"tool_choice": "required", "max_tokens": 4}, {}, "max_tokens", "the shortest text"),
        ({"response_format": FORMAT}, {"thinking_token_budget": 0}, "thinking_token_budget", "greater"),
    ],
    ids=str,
)
def test_what_cannot_be_held_to_is_refused_by_name(
    changes: dict[str, Any], body: dict[str, Any], param: str, said: str, server: Running
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, body, **changes)
    assert caught.value.param == param
    assert said in caught.value.message
