"""Chats and tools as OpenAI's interfaces, transformers and people write them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from chats import LOOK
from dgemma_ext.checkpoint.messages import checked_messages, checked_tools

HI = {"role": "user", "content": "hi"}
SCHEMA = LOOK["function"]


def call(name: str = "look", arguments: Any = None, **fields: Any) -> dict[str, Any]:
    return {
        "function": {"name": name, "arguments": {} if arguments is None else arguments},
        "type": "function",
        **fields,
    }


def asking(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


def text(*parts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts]


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "model", "content": None, "refusal": None, "tool_calls": None}, ""),
        ({"role": "user", "content": ["a", "b"]}, text("a", "b")),
        ({"role": "user", "content": [{"type": "input_text", "text": "a"}]}, text("a")),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]}, text("a")),
        ({"role": "user", "content": ({"type": "text", "text": "a"}, "b")}, text("a", "b")),
        (SimpleNamespace(model_dump=lambda: {"role": "assistant", "content": "a", "audio": None}), "a"),
    ],
)
def test_forms_of_content(message: Any, content: Any) -> None:
    (first, made, last) = checked_messages((HI, message, HI))
    assert first == last == HI
    assert made["content"] == content
    assert set(made) == {"role", "content"}


def test_a_call_and_its_result_in_openai_s_words() -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": [call(arguments='{"what": [1, null]}', id="a7")]}
    result = {"role": "tool", "tool_call_id": "a7", "content": "found"}
    assert checked_messages([HI, asked, result]) == [
        HI,
        asking(call(arguments={"what": [1, None]}, id="a7")),
        {"role": "tool", "tool_call_id": "a7", "name": "look", "content": "found"},
    ]


@pytest.mark.parametrize("arguments", ["", " ", "{}", None, {}])
def test_a_call_without_arguments(arguments: Any) -> None:
    asked = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": arguments}}]}
    assert checked_messages([HI, asked])[1] == asking(call())


def test_a_flat_call() -> None:
    asked = {"role": "assistant", "tool_calls": ({"name": "look", "arguments": {"a": 1}},)}
    assert checked_messages([HI, asked])[1] == asking(call(arguments={"a": 1}))


@pytest.mark.parametrize(
    ("results", "names"),
    [
        ([{"tool_call_id": "2"}, {"tool_call_id": "1"}, {"tool_call_id": "3"}], ["find", "look", "look"]),
        ([{"name": "look"}, {"name": "find"}, {"name": "look"}], ["look", "find", "look"]),
        ([{}, {}, {}], ["look", "find", "look"]),
        ([{"name": "find"}, {}, {}], ["find", "look", "look"]),
        ([{"tool_call_id": "3", "name": "look"}, {}, {}], ["look", "look", "find"]),
    ],
)
def test_results_find_their_calls(results: list[dict[str, str]], names: list[str]) -> None:
    asked = asking(call("look", id="1"), call("find", id="2"), call("look", id="3"))
    made = checked_messages([HI, asked, *({"role": "tool", "content": "x", **result} for result in results), HI])
    assert [message["name"] for message in made[2:5]] == names
    assert sorted(message["tool_call_id"] for message in made[2:5]) == ["1", "2", "3"]


def test_a_result_may_be_data_and_the_caller_s_messages_stay_as_they_were() -> None:
    messages = [HI, asking(call(arguments="{}")), {"role": "tool", "content": {"n": 1}}]
    assert checked_messages(messages)[2] == {"role": "tool", "name": "look", "content": {"n": 1}}
    assert messages == [HI, asking(call(arguments="{}")), {"role": "tool", "content": {"n": 1}}]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"role": "user", "content": None}], r"messages\[0\]\['content'\] must be a string or .*, got None"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\]\['content'\] must be .*, got b'x'"),
        ([{"role": "user", "content": [["x"]]}], r"messages\[0\]\['content'\]\[0\] must be text, .*, got \['x'\]"),
        (
            [{"role": "user", "content": [{"type": "input_image"}]}],
            r"\['content'\]\[0\] must be an image: .*, got {'type': 'input_image'}",
        ),
        (
            [{"role": "user", "content": "a\udcff"}],
            r"\['content'\] must be text .*, '\\udcff', at character 1",
        ),
        ([{"role": "user", "content": ["a", "\udcff"]}], r"\['content'\]\[1\] must be text .* got a lone surrogate"),
        (
            [{"role": "user", "content": text("\udcff")}],
            r"\[0\]\['text'\] must be text .* got a lone surrogate",
        ),
        (
            [{"role": "user", "content": "x", "tool_calls": [call()]}],
            r"messages\[0\]\['role'\] must be assistant where there are tool_calls, got 'user'",
        ),
        (
            [HI, {"role": "assistant", "tool_calls": "look"}],
            r"\['tool_calls'\] must be a list of tool calls, got 'look'",
        ),
        ([HI, asking({"function": {}})], r"messages\[1\]\['tool_calls'\]\[0\] must be .*name.*, got {'function': {}}"),
        ([HI, asking(call(arguments="{a}"))], r"\[0\]: arguments must be JSON, got '{a}': Expecting property name"),
        ([HI, asking(call(arguments="[" * 99999))], r"\[0\]: arguments must be JSON, got '\[\[.*: maximum recursion"),
        ([HI, asking(call(arguments="[1]"))], r"\[0\]: arguments must be a mapping, or one as JSON, got \[1\]"),
        (
            [HI, {"role": "tool", "content": "x"}],
            r"messages\[1\] must have a tool call before it that",
        ),
        (
            [HI, asking(call()), HI],
            r"messages\[2\]\['role'\] must be tool, .* the call of look, got 'user'",
        ),
        (
            [HI, asking(call(id="1")), {"role": "tool", "tool_call_id": "2", "content": "x"}],
            r"messages\[2\] must have a tool call before it of tool_call_id '2' that",
        ),
        (
            [HI, asking(call(id="1")), *[{"role": "tool", "tool_call_id": "1", "content": "x"}] * 2],
            r"messages\[3\] must have a tool call .* that has no result yet",
        ),
        ([HI, asking(call()), {"role": "tool", "name": "find", "content": "x"}], "of name 'find'"),
    ],
)
def test_messages_that_are_refused(messages: list[Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        checked_messages(messages)


@pytest.mark.parametrize(
    "tool", [LOOK, SCHEMA, {"type": "function", **SCHEMA}, {"type": "function", "function": {**SCHEMA, "strict": None}}]
)
def test_forms_of_tools(tool: dict[str, Any]) -> None:
    assert checked_tools((tool,)) == [LOOK]


def test_no_tools() -> None:
    assert checked_tools(None) is None
    assert checked_tools([]) is None


@pytest.mark.parametrize(
    ("tools", "match"),
    [
        ("look", "tools must be a list of JSON schemas of functions, got 'look'"),
        (LOOK, "tools must be a list .*, got {"),
        ([len], r"tools\[0\] must be .*get_json_schema.*, got <built-in function len>"),
        (["look"], r"tools\[0\] must be the JSON schema of a function, got 'look'"),
        ([{"type": "retrieval"}], r"tools\[0\]\['type'\] must be one of function, got 'retrieval'"),
        ([{"function": "look"}], r"tools\[0\]\['function'\] must be a mapping .*, got 'look'"),
        ([{"function": {}}], r"tools\[0\]\['function'\]\['name'\] must be .*, got None"),
        ([{"name": "a{b"}], r"\['name'\] must be a name without braces, got 'a{b'"),
        ([{"name": "a", "description": 3}], r"\['description'\] must be a string, got 3"),
        (
            [LOOK, {"name": "a", "parameters": []}],
            r"tools\[1\].*\['parameters'\] must be a JSON schema, got \[\]",
        ),
    ],
)
def test_tools_that_are_refused(tools: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        checked_tools(tools)
