"""Answers taken apart: text, thoughts and tool calls, by the ids of their markers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_ext as dg
from chats import json_objects, texts
from dgemma_ext.checkpoint import Tokenizer
from tokenizer_files import SPECIAL_TOKENS

CALL, RESPONSE, CHANNEL, TURN = (
    SPECIAL_TOKENS[f"<|{name}>"] for name in ("tool_call", "tool_response", "channel", "turn")
)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of an answer that is written with its markers."""
    return tokenizer.encode(text, special_tokens="tokens")


def parsed(tokenizer: Tokenizer, text: str, prefix: str = "") -> dg.Response:
    return tokenizer.parse_response(ids_of(tokenizer, text), prefix=ids_of(tokenizer, prefix))


def call_of(tokenizer: Tokenizer, written: str) -> Any:
    """The arguments of a call that is written so, or the error."""
    response = parsed(tokenizer, f"<|tool_call>{written}<tool_call|>")
    assert response.text == response.thinking == ""
    assert len(response.tool_calls) + len(response.invalid_tool_calls) == 1
    if response.tool_calls:
        assert response.tool_calls[0].name == "f"
        return response.tool_calls[0].arguments
    assert response.invalid_tool_calls[0].text == f"<|tool_call>{written}<tool_call|>"
    return response.invalid_tool_calls[0].error


@pytest.mark.parametrize(
    ("answer", "text", "thinking"),
    [
        ("Hello!<turn|>", "Hello!", ""),
        ("<|channel>thought\nhmm\n<channel|>42<turn|>", "42", "hmm"),
        ("<|channel>thought\n<channel|>42", "42", ""),
        ("<|channel>thought\na\n\nb\n<channel|>1<|channel>thought\nc\n<channel|>2", "12", "a\n\nb\nc"),
        ("<|channel>thought\nnever closed", "", "never closed"),
        ("<|channel>thoug", "", ""),
        ("<|channel>thoughtful", "", "thoughtful"),
        ("<|channel>plan\nfirst", "", "plan\nfirst"),
        ("a<channel|>b<tool_call|>c<|think|>d<eos>", "abcd", ""),
        ("a<|tool_response>response:f{value:1}<tool_response|>b<|tool_response>", "ab", ""),
        ("", "", ""),
    ],
)
def test_text_and_thoughts(tokenizer: Tokenizer, answer: str, text: str, thinking: str) -> None:
    assert parsed(tokenizer, answer) == dg.Response(text, thinking)


def test_text_that_spells_markers_is_text(tokenizer: Tokenizer) -> None:
    text = '<|channel>thought\nx<channel|><|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|><turn|>'
    assert tokenizer.parse_response(tokenizer.encode(text)) == dg.Response(text)


def test_an_answer_goes_on_with_what_its_prompt_began(tokenizer: Tokenizer) -> None:
    turn = "<|turn>user\nx<turn|>\n<|turn>model\n"
    assert parsed(tokenizer, "hm\n<channel|>42", f"{turn}<|channel>thought\n") == dg.Response("42", "hm")
    assert parsed(tokenizer, "hm\n<channel|>42", f"{turn}<|channel>thought\n<channel|>") == dg.Response("hm\n42")
    assert parsed(tokenizer, "hm", f"<|channel>thought\n{turn}") == dg.Response("hm")
    response = parsed(tokenizer, 'b<|"|>}<tool_call|>', turn + '<|tool_call>call:f{a:<|"|>')
    assert response == dg.Response(tool_calls=(dg.ToolCall("f", {"a": "b"}),))


def test_several_calls_between_text(tokenizer: Tokenizer) -> None:
    response = parsed(
        tokenizer,
        "<|channel>thought\nTwo.\n<channel|>So:<|tool_call>call:a{}<tool_call|><|tool_call>call:b.c-d{x:{y:[1]}}"
        "<tool_call|>!<|tool_response>",
    )
    calls = (dg.ToolCall("a", {}), dg.ToolCall("b.c-d", {"x": {"y": [1]}}))
    assert response == dg.Response("So:!", "Two.", calls)


@settings(max_examples=300, deadline=None)
@given(arguments=json_objects(), name=st.from_regex(r"[A-Za-z_][\w.-]{0,8}", fullmatch=True))
def test_a_call_of_the_template_is_read_back(tokenizer: Tokenizer, arguments: dict[str, Any], name: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
    ids = tokenizer.encode_prompt([{"role": "user", "content": "x"}, call])
    response = tokenizer.parse_response(ids[ids.index(CALL) :])
    assert response.invalid_tool_calls == ()
    assert response.tool_calls == (dg.ToolCall(name, arguments),)
    # 1 == 1.0 == True to Python.
    assert repr(_sorted(response.tool_calls[0].arguments)) == repr(_sorted(arguments))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def test_the_deepest_call_goes_back_into_the_history(tokenizer: Tokenizer) -> None:
    arguments = call_of(tokenizer, "call:f{a:" + "[" * 99 + '<|"|>x<<|"|>' + "]" * 99 + "}")
    call = dg.Response(tool_calls=(dg.ToolCall("f", arguments),))
    ids = tokenizer.encode_prompt([{"role": "user", "content": "x"}, call.message])
    assert tokenizer.parse_response(ids[ids.index(CALL) :]).tool_calls == call.tool_calls


@settings(max_examples=100, deadline=None)
@given(text=texts(), thinking=texts(), arguments=json_objects())
def test_a_message_renders_to_the_same_answer(
    tokenizer: Tokenizer, text: str, thinking: str, arguments: dict[str, Any]
) -> None:
    """Out of an answer into the history, and back."""
    text, thinking = (one.strip().replace("▁", " ") for one in (text, thinking))
    answer = dg.Response(text, thinking, (dg.ToolCall("f", arguments), dg.ToolCall("g", {})))
    question = {"role": "user", "content": "x"}
    prompt = tokenizer.encode_prompt([question])
    ids = tokenizer.encode_prompt([question, answer.message])
    turn = len(prompt) - prompt.index(TURN, 2)  # <|turn>model, which both end with
    assert ids[: len(prompt)] == prompt
    assert tokenizer.parse_response(ids[len(prompt) : -turn]) == answer


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("call:f{}", {}),
        (" call: f { } ", {}),
        ("call:f{a:1,b:-2.5e3,c:true,d:null}", {"a": 1, "b": -2500.0, "c": True, "d": None}),
        ("call:f{a:True,b:False,c:None}", {"a": True, "b": False, "c": None}),
        (
            'call:f{"a":"x, \\"y\\"}",\'b\':\'z\\\'s\',<|"|>c<|"|>:<|"|>"\'}{<|"|>}',
            {"a": 'x, "y"}', "b": "z's", "c": "\"'}{"},
        ),
        ('call:f{a:["one","two"], b : [ ] , c:{ }}', {"a": ["one", "two"], "b": [], "c": {}}),
        ('call:f{a:"two\nlines"}', {"a": "two\nlines"}),
        ('call:f{a:<|"|><|"|>}', {"a": ""}),
        ('call:f{a:<|"|>x<turn|>y\\n<|"|>}', {"a": "x<turn|>y\\n"}),
        ("call:f{two words:1,ключ:2}", {"two words": 1, "ключ": 2}),
        ("call:f{a:" + "[" * 99 + "]" * 99 + "}", {"a": eval("[" * 99 + "]" * 99)}),
    ],
)
def test_calls_that_can_be_read(tokenizer: Tokenizer, written: str, arguments: dict[str, Any]) -> None:
    assert call_of(tokenizer, written) == arguments


@pytest.mark.parametrize(
    ("written", "error"),
    [
        ("", "it ends before call:"),
        ("f{}", "it has 'f{}' where call: should be"),
        ("call:f", "it does not begin with call:NAME{"),
        ("call:{}", "it does not begin with call:NAME{"),
        ("call:f{a:1", "it ends before ,"),
        ("call:f{a}", "it ends before :"),
        ("call:f{a:}", "it has '}' where a value should be"),
        ("call:f{a:Rome}", "it has 'Rome}' where a value should be"),
        ("call:f{a:1 b:2}", "it has 'b:2}' where , should be"),
        ("call:f{a:1,}", "it ends before :"),
        ("call:f{a:[1,]}", "it has ']}' where a value should be"),
        ("call:f{a:01}", "it has '01}' where a value should be"),
        ("call:f{a:1e999}", "the number 1e999 is too large"),
        ("call:f{a:NaN}", "it has 'NaN}' where a value should be"),
        ("call:f{a:1}}", "it has '}' where the end of the call should be"),
        ("call:f{a:1} or so", "it has 'or so' where the end of the call should be"),
        ('call:f{a:<|"|>x}', "a string is not closed"),
        ('call:f{a:<|"|>x<|"|>y<|"|>}', "a string is not closed"),
        ('call:f{a:<|"|>x<|"|>y}', "it has 'y}' where , should be"),
        ('call:f{a:"x}', "it has '\"x}' where a string that ends should be"),
        ('call:f{a:"\\q"}', 'the string "\\q" cannot be read'),
        ("call:f{a:<eos>1}", "it has '<eos>1}' where a value should be"),
        ("call:f{a:\0}", "it has a NUL outside of its strings"),
        ("call:f{a:" + "[" * 100 + "]" * 100 + "}", "it is nested deeper than 100 levels"),
        ("call:f{a:" + "[" * 5000, "it is nested deeper than 100 levels"),
        ("call:f{a:" + "9" * 5000 + "}", "a number cannot be read"),
    ],
)
def test_calls_that_cannot_be_read_are_told(tokenizer: Tokenizer, written: str, error: str) -> None:
    assert call_of(tokenizer, written).startswith(error)


@settings(max_examples=300, deadline=None)
@given(written=st.lists(st.sampled_from([*"{}[]:,\"' -1ae\\\n", "call:f{", '<|"|>', "true", "<turn|>"]), max_size=24))
def test_no_call_raises(tokenizer: Tokenizer, written: list[str]) -> None:
    call_of(tokenizer, "call:f{" + "".join(written))


def test_a_call_that_is_not_closed(tokenizer: Tokenizer) -> None:
    """The end of an answer may take the place of its marker; a call that is cut is told as it is."""
    for end in ("", "<turn|>", "<|tool_response>", "<eos>"):
        assert parsed(tokenizer, "<|tool_call>call:f{a:1}" + end).tool_calls == (dg.ToolCall("f", {"a": 1}),)
        cut = parsed(tokenizer, 'x<|tool_call>call:f{a:<|"|>y' + end)
        assert cut.text == "x"
        assert cut.tool_calls == ()
        assert cut.invalid_tool_calls == (
            dg.InvalidToolCall('<|tool_call>call:f{a:<|"|>y', "it is not closed, and a string is not closed"),
        )
    two = parsed(tokenizer, "<|channel>thought\nx<|tool_call>call:f{<|tool_call>call:g{}<tool_call|>y")
    assert (two.text, two.thinking, two.tool_calls) == ("y", "x", (dg.ToolCall("g", {}),))
    assert [call.text for call in two.invalid_tool_calls] == ["<|tool_call>call:f{"]


def test_decode_leaves_thoughts_out_and_keeps_what_a_call_needs(tokenizer: Tokenizer) -> None:
    ids = ids_of(
        tokenizer, '<|channel>thought\nhm\n<channel|>Go.<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|><|"|><turn|>'
    )
    assert tokenizer.decode(ids) == 'Go.call:f{a:<|"|>b<|"|>}'
    assert tokenizer.encode(tokenizer.decode(ids, skip_special_tokens=False), special_tokens="tokens") == ids


@settings(max_examples=200, deadline=None)
@given(
    written=st.lists(
        st.sampled_from([*SPECIAL_TOKENS, "thought\n", "thought", "\n", "a", "the sky", "call:f{}"]), max_size=16
    ),
    cut=st.integers(0, 40),
)
def test_what_is_read_so_far_is_kept(tokenizer: Tokenizer, written: list[str], cut: int) -> None:
    """Text and thoughts of the first canvases are the beginning of those of all."""
    ids = ids_of(tokenizer, "".join(written))
    part, whole = (tokenizer.parse_response(some) for some in (ids[:cut], ids))
    assert whole.text.startswith(part.text)
    assert whole.thinking.startswith(part.thinking)
    assert whole.tool_calls[: max(0, len(part.tool_calls) - 1)] == part.tool_calls[:-1]


@given(st.lists(st.sampled_from(sorted({*SPECIAL_TOKENS.values(), *range(108, 480)})), max_size=30), st.data())
def test_which_tokens_are_text(tokenizer: Tokenizer, ids: list[int], data: st.DataObject) -> None:
    """Decoded by themselves they give the text, where no character is split between its parts."""
    cut = data.draw(st.integers(0, len(ids)))
    prefix, answer = ids[:cut], ids[cut:]
    flags = tokenizer.is_text(answer, prefix)
    assert len(flags) == len(answer)
    text = tokenizer.parse_response(answer, prefix).text
    kept = tokenizer.decode([token for token, is_text in zip(answer, flags, strict=True) if is_text])
    if "\ufffd" not in text + kept:
        assert kept == text
