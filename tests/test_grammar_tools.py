"""Tool calls as a grammar: whatever the logits say, the engine's own parser reads calls with valid arguments."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_ext as dg
from backend import BACKEND
from chats import LOOK
from command import dgemma
from dgemma_ext import demo
from dgemma_ext.sampling import FAILED, CompiledGrammar, Walks
from grammar_cases import record
from grammar_steps import answer, defaults, flat, hostile, ids_of, marker, peaked, tokenizer
from schema_strategies import objects, schemas

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="grammars are on the CPU alone")

FAST = dg.SamplerConfig(max_denoising_steps=3)
PROMPT = demo.draw(6, 1).text
RESPONSE = "<|tool_response>"
CITY = {"type": "string", "pattern": "^[A-Z][a-z]*$"}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": record(**properties)}}


WEATHER = tool("get_weather", city=CITY, days={"type": "integer", "minimum": 1, "maximum": 9})
SEARCH = tool("search", query={"type": "string"}, limit={"type": ["integer", "null"]})


@pytest.fixture(scope="module")
def model() -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")


def compiled(grammar: dg.Grammar, thinks: bool = False) -> CompiledGrammar:
    ends, pad = defaults().eos_token_ids, defaults().pad_token_id
    return dg.sampling.compile_grammar(grammar, tokenizer(), tokenizer().vocab_size, ends, pad, thinks)


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    state = grammar.walk(grammar.start, ids_of(text))
    return state != FAILED and bool(grammar.distance[state] == 0)


def check(response: dg.Response, tools: list[dict[str, Any]], names: set[str], parallel: bool = True) -> None:
    """That an answer's calls are of these tools, and valid."""
    parameters = {one["function"]["name"]: one["function"]["parameters"] for one in tools}
    assert response.invalid_tool_calls == ()
    assert len(response.tool_calls) <= 1 or parallel
    for call in response.tool_calls:
        assert call.name in names
        jsonschema.validate(call.arguments, parameters[call.name], format_checker=jsonschema.FormatChecker())


# Names of tools with schemas of their arguments.
_tools = st.lists(
    st.tuples(st.sampled_from(["f", "get_weather", "ns.look-up", "sieh nach"]), objects(schemas)),
    min_size=1,
    max_size=3,
    unique_by=lambda one: one[0],
).map(lambda made: [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in made])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(_tools, st.integers(0, 1000))
def test_random_walks_are_calls_with_valid_arguments(tools: list[dict[str, Any]], seed: int) -> None:
    walks, rng = Walks(compiled(dg.ToolCalls(tools, "required"))), random.Random(seed)
    for wander in (0, 10, 60):
        response = tokenizer().parse_response(walks.draw(rng, wander))
        check(response, tools, {one["function"]["name"] for one in tools})
        assert response.tool_calls


@settings(max_examples=30, deadline=None, derandomize=True)
@given(_tools, st.data(), st.sampled_from([flat, peaked, hostile]), st.booleans(), st.booleans())
def test_whatever_the_logits_say_the_calls_are_valid_and_closed(
    tools: list[dict[str, Any]], data: st.DataObject, logits: Any, parallel: bool, drawn: bool
) -> None:
    names = {one["function"]["name"] for one in tools}
    choice = data.draw(st.sampled_from(["auto", "required", *sorted(names)]))
    grammar = dg.ToolCalls(tools, choice, parallel)
    budget = compiled(grammar).shortest + data.draw(st.sampled_from([1, 2, 7, 60]))
    tokens = answer(grammar, budget, data.draw(st.integers(0, 99)), logits, drawn=drawn)
    response = tokenizer().parse_response(tokens)
    check(response, tools, names if choice in ("auto", "required") else {choice}, parallel)
    assert response.tool_calls or choice == "auto"
    assert choice == "auto" or response.text == ""


def test_a_call_as_the_template_writes_it() -> None:
    grammar = compiled(dg.ToolCalls([WEATHER, SEARCH], "required"))
    one, other = '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>,days:2}<tool_call|>', "<|tool_call>call:search{"
    assert accepts(grammar, one)
    assert accepts(grammar, one + one)
    assert accepts(grammar, other + 'limit:null,query:<|"|>a "b"\n{}<tool_call|> é<|"|>}<tool_call|>') is False
    assert accepts(grammar, other + 'limit:null,query:<|"|>a "b"\n{} é<|"|>}<tool_call|>')
    for wrong in (
        one[:-1],
        "Hm. " + one,
        one.replace("days:2", "days:0"),
        one.replace("Rome", "rome"),
        one.replace(":get_weather", ":search"),
        '<|tool_call>call:get_weather{days:2,city:<|"|>Rome<|"|>}<tool_call|>',
        "<|tool_call>call:get_weather{city:Rome,days:2}<tool_call|>",
        one.replace("<|tool_call>", ""),
    ):
        assert not accepts(grammar, wrong), wrong


def test_the_template_s_own_calls_are_accepted() -> None:
    """A conversation's calls, as a chat template of the published kind renders them."""
    arguments = {"b": ["x", 1, None], "A": {"k": True, "a b:c": "é"}, "z": 0.5}
    item = {"type": ["string", "integer", "null"]}
    nested = record(**{"k": {"type": "boolean"}, "a b:c": {"type": "string"}})
    tools = [tool("f", b={"type": "array", "items": item}, A=nested, z={"type": "number"})]
    grammar = compiled(dg.ToolCalls(tools, "f"))
    text = '<|tool_call>call:f{A:{<|"|>a b:c<|"|>:<|"|>é<|"|>,k:true},b:[<|"|>x<|"|>,1,null],z:0.5}<tool_call|>'
    assert accepts(grammar, text)
    assert tokenizer().parse_response(ids_of(text)).tool_calls == (dg.ToolCall("f", arguments),)


def test_special_tokens_are_themselves_alone() -> None:
    grammar = compiled(dg.ToolCalls([SEARCH], "required"))
    begin = grammar.walk(grammar.start, ids_of('<|tool_call>call:search{limit:1,query:<|"|>'))
    assert begin != FAILED
    end = ids_of('<|"|>}<tool_call|>')
    for text in ("<tool_call|>", '<|"|>', "<|tool_call>"):  # as characters they are text like any other
        state = grammar.walk(begin, tokenizer().encode(text))
        assert grammar.distance[grammar.walk(state, end)] == 0
    for token in tokenizer().special_ids - {marker('<|"|>')}:
        assert grammar.after(begin, token) == FAILED
    of_byte = {text: token for token, text in enumerate(tokenizer().token_bytes()) if text is not None}
    for name in ("<tool_call|>", '<|"|>'):
        spelled = chr(0x100000 + marker(name)).encode()
        assert grammar.walk(begin, [of_byte[bytes([byte])] for byte in spelled]) == FAILED


def test_what_follows_a_call_is_the_token_of_its_response() -> None:
    grammar = compiled(dg.ToolCalls([SEARCH]))
    response, others = marker(RESPONSE), [marker("<turn|>"), marker("<eos>")]
    text = grammar.walk(grammar.start, ids_of("Hm."))
    called = grammar.walk(text, ids_of('<|tool_call>call:search{limit:1,query:<|"|><|"|>}<tool_call|>'))
    assert grammar.after(called, response) == grammar.end
    assert [grammar.after(called, token) for token in others] == [FAILED, FAILED]
    assert grammar.after(text, response) == FAILED
    assert [grammar.after(text, token) for token in others] == [grammar.end, grammar.end]
    assert grammar.after(called, ids_of("x")[0]) == FAILED


def test_what_each_choice_takes() -> None:
    call, other = (f'<|tool_call>call:{name}{{what:<|"|>x<|"|>}}<tool_call|>' for name in ("look", "see"))
    see = {"type": "function", "function": {**LOOK["function"], "name": "see"}}
    texts = ["", "Hm.", call, other, call + other, "Hm. " + call + call, call + "Hm.", "[1]", "[1]" + call]
    taken = {
        name: [accepts(compiled(grammar), text) for text in texts]
        for name, grammar in {
            "auto": dg.ToolCalls([LOOK, see]),
            "auto, one": dg.ToolCalls([LOOK, see], parallel=False),
            "required": dg.ToolCalls([LOOK, see], "required"),
            "required, one": dg.ToolCalls([LOOK, see], "required", parallel=False),
            "look": dg.ToolCalls([LOOK, see], "look"),
            "text": dg.ToolCalls([LOOK, see], text=dg.JsonSchema({"type": "array"})),
        }.items()
    }
    assert taken == {
        "auto": [True, True, True, True, True, True, False, True, True],
        "auto, one": [True, True, True, True, False, False, False, True, True],
        "required": [False, False, True, True, True, False, False, False, False],
        "required, one": [False, False, True, True, False, False, False, False, False],
        "look": [False, False, True, False, False, False, False, False, False],
        "text": [False, False, True, True, True, False, False, True, False],
    }


def test_tools_without_parameters_and_with_any() -> None:
    bare: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
    grammar = compiled(dg.ToolCalls([bare, {"name": "any", "parameters": {"type": "object"}}], "required"))
    assert accepts(grammar, "<|tool_call>call:now{}<tool_call|>")
    assert not accepts(grammar, "<|tool_call>call:now{a:1}<tool_call|>")
    assert accepts(grammar, '<|tool_call>call:any{a:1,<|"|>b c<|"|>:[{x:<|"|>y<|"|>}]}<tool_call|>')


def test_tools_that_cannot_be_followed_are_named() -> None:
    wrong = tool("f", a={"type": "array", "uniqueItems": True})
    with pytest.raises(dg.GrammarError) as caught:
        compiled(dg.ToolCalls([LOOK, wrong]))
    place = "/1/function/parameters/properties/a"
    assert (caught.value.pointer, caught.value.keyword) == (place, "uniqueItems")
    nested = {"$defs": {"x": {"type": "string", "not": {}}}, **record(a={"$ref": "#/$defs/x"})}
    with pytest.raises(dg.GrammarError) as caught:
        compiled(dg.ToolCalls([{"name": "f", "parameters": nested}]))
    assert (caught.value.pointer, caught.value.keyword) == ("/0/function/parameters/$defs/x", "not")
    for parameters in (
        {"type": "string"},
        {"anyOf": [record(), {"const": 1}]},
        {"$ref": "#/x", "x": {}},
        {"title": "x"},
    ):
        with pytest.raises(dg.GrammarError, match="does not describe an object"):
            compiled(dg.ToolCalls([{"name": "f", "parameters": parameters}]))
    for given_tools, choice, more, message in (
        ([], "auto", {}, "tools is empty"),
        ([LOOK], "see", {}, "choice must be one of auto, required, look"),
        ([LOOK, LOOK], "auto", {}, r"tools\[1\]\['function'\]\['name'\]"),
        ([{"name": " f"}], "auto", {}, "without white space"),
        ([LOOK], "look", {"text": dg.Regex("a")}, "text is for the choice auto"),
    ):
        with pytest.raises(ValueError, match=message):
            dg.ToolCalls(given_tools, choice, **more)  # type: ignore[arg-type]


def test_the_engine_calls_tools(model: dg.DiffusionGemma) -> None:
    """The bundled model writes digits and knows nothing of tools."""
    grammars = [dg.ToolCalls([WEATHER, SEARCH], choice) for choice in ("required", "get_weather", "auto")]
    given = {"max_new_tokens": 60, "sampler": FAST}
    together = model.generate([PROMPT] * 3, seed=[1, 2, 3], grammar=grammars, **given)
    for seed, (grammar, out) in enumerate(zip(grammars, together, strict=True), start=1):
        assert model.generate(PROMPT, seed=seed, grammar=grammar, **given).token_ids == out.token_ids
        assert model.tokenizer is not None
        check(model.tokenizer.parse_response(out.token_ids), [WEATHER, SEARCH], {"get_weather", "search"})
        assert out.parsed == ([(call.name, call.arguments) for call in out.tool_calls] or out.text)
    assert together[0].tool_calls
    assert {call.name for call in together[1].tool_calls} == {"get_weather"}
    if together[0].finish_reason == "eos":
        assert together[0].token_ids[-1] == marker(RESPONSE)


def test_the_command_calls_tools(tmp_path: Any) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([WEATHER]))
    run = dgemma(
        *("generate", str(demo.checkpoint(6)), PROMPT, "--steps", "2", "--max-new-tokens", "60", "--device", "cpu"),
        *("--tools", str(tools), "--tool-choice", "get_weather", "--json"),
    )
    assert run.code == 2  # the bundled model's template has no tools
    assert "tools is given, but the chat template" in run.err
    assert "--tool-choice needs --tools" in dgemma("generate", "6x6", PROMPT, "--tool-choice", "auto").err
