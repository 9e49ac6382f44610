"""Grammars compiled to automata over tokens: regular expressions, choices, limits, and the classes of tokens."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_ext as dg
from chats import LOOK
from command import dgemma
from dgemma_ext import demo
from dgemma_ext.sampling.grammar import FAILED, compile_grammar, pattern, vocabulary_of
from grammar_cases import (
    CLOSE,
    END,
    OPEN,
    PAD,
    SCHEMAS,
    SPECIAL,
    TEXTS,
    VOCABULARY,
    accepts,
    arcs_by_source,
    arcs_by_target,
    compiled,
    expressions,
    random_walk,
    spelled,
    text_of,
)
from other_threads import turns_during


@settings(max_examples=40, deadline=None, derandomize=True)
@given(expressions(), st.lists(st.text("ab01é日ü٣_\n x", max_size=6), max_size=12), st.integers(0, 1000))
def test_an_expression_means_what_re_says(expression: str, texts: list[str], seed: int) -> None:
    grammar = compiled(dg.Regex(expression))
    for text in texts:
        assert accepts(grammar, text) == (re.fullmatch(expression, text) is not None) or not text.isascii(), text
    for text in texts:
        assert re.fullmatch(expression, text) or not accepts(grammar, text), text
    walked = text_of(random_walk(grammar, seed, wander=12)).decode()
    assert re.fullmatch(expression, walked), walked


def test_every_token_leads_where_its_bytes_lead() -> None:
    grammar = compiled(dg.Regex('(?:"[^"\\\\]*(?:th|er|日)+"|\\{(?:1|23)*\\}|true, )*'))
    assert grammar.states > 10
    for state in range(grammar.states - 1):
        for token, text in enumerate(VOCABULARY.texts):
            if token in SPECIAL or not text:
                continue
            # Single bytes may pass through states in which no token ends, but those of one byte do.
            assert grammar.after(state, token) == grammar.walk(state, spelled(text)), (state, token)
    assert arcs_by_source(grammar) == arcs_by_target(grammar)
    assert len(arcs_by_source(grammar)) == grammar.arcs


def test_end_and_padding() -> None:
    grammar = compiled(dg.Choice(["a", "ab"]))
    a, b = spelled("ab")
    accepting = grammar.walk(grammar.start, [a])
    assert grammar.after(accepting, END) == grammar.end
    assert grammar.after(grammar.start, END) == FAILED
    assert grammar.after(grammar.end, PAD) == grammar.end
    assert grammar.after(grammar.end, a) == grammar.after(grammar.end, END) == FAILED
    assert grammar.after(accepting, PAD) == FAILED
    assert grammar.walk(grammar.start, [a, b, END, PAD, PAD]) == grammar.end
    free = compiled(dg.Choice(["a", "ab"]), pad=None)
    for token in (a, b, END, PAD, OPEN, len(VOCABULARY.string_of_id) - 1):
        assert free.after(free.end, token) == free.end
    assert free.after(accepting, END) == free.end
    assert free.after(free.start, END) == FAILED


def test_the_distance_is_the_fewest_tokens() -> None:
    grammar = compiled(dg.Regex('(?:true, )*null|(?:\\{"){3}x{5}'))
    for state in range(grammar.states):
        reached, steps = {state}, 0
        accepting = {s for s in range(grammar.states) if s == grammar.end or grammar.after(s, END) != FAILED}
        while not reached & accepting:
            reached = {int(t) for s in reached for t in grammar.out_target[slice(*grammar.out_begin[s : s + 2])]}
            steps += 1
        assert grammar.distance[state] == steps
    assert grammar.shortest == 1


def test_the_automaton_is_the_least() -> None:
    # Even numbers of a, any number of b: two states and END; many ways to say it.
    for expression in ("(b*ab*ab*)*|b*", "(?:b|ab*a)*", "(?:(?:b|ab*a)(?:b|ab*a)*)?"):
        vocabulary = vocabulary_of([None, None, b"a", b"b"], [0, 1], 4)
        grammar = dg.sampling.grammar.compile_pattern(dg.Regex(expression).pattern(), vocabulary, [1], 0)
        assert (grammar.states, grammar.arcs) == (3, 6)


def test_special_tokens_are_spelled_by_nothing_but_themselves() -> None:
    grammar = compiled(
        pattern.concat(pattern.symbol(OPEN), pattern.repeat(pattern.ANY), pattern.symbol(CLOSE), pattern.literal("!"))
    )
    inside = grammar.walk(grammar.start, [OPEN])
    assert inside != FAILED
    assert grammar.walk(inside, [*spelled("text é"), CLOSE, *spelled("!")]) != FAILED
    assert grammar.walk(grammar.start, spelled(chr(pattern.SYMBOLS + OPEN))) == FAILED
    assert grammar.walk(inside, spelled(b"\xf4")) == FAILED
    assert grammar.after(inside, OPEN) == FAILED
    text = compiled(dg.Regex("(?s:.*)"))
    for token in SPECIAL:
        assert text.after(text.start, token) in ((text.end,) if token == END else (FAILED,))
    with pytest.raises(dg.GrammarError, match="too large an id"):
        pattern.symbol(70_000)


def test_tokens_without_bytes_and_ids_beyond_the_tokenizer_lead_nowhere() -> None:
    grammar = compiled(dg.Regex("(?s:.*)"))
    assert all(grammar.after(grammar.start, token) == FAILED for token in range(len(TEXTS), len(TEXTS) + 7))
    assert grammar.after(grammar.start, len(TEXTS) + 7) == FAILED
    assert grammar.after(FAILED, spelled("a")[0]) == FAILED


BAD = {
    "an empty language": (r"[^\s\S]", "no text matches"),
    "look-ahead": ("a(?=b)", "no automaton follows, or an anchor inside: assert"),
    "look-behind": ("(?<!a)b", "no automaton follows, or an anchor inside: assert not"),
    "a back-reference": (r"(a)\1", "no automaton follows, or an anchor inside: groupref"),
    "an atomic group": ("(?>a*)a", "no automaton follows, or an anchor inside: atomic group"),
    "an anchor inside": ("a^b", "no automaton follows, or an anchor inside: at"),
    "flags": ("(?i)a", "has flags"),
    "a syntax error": ("a(", "cannot be read"),
    "a long expression": ("a" * 70_000, "70000 bytes, more than the limit of 65536; shorten it"),
    "a long repetition": ("a{30000}", "repeats 30000 times; lower it to 20000"),
    "many states": ("[ab]{20000}", "more states 16384 allow"),
    "100,000 states": ("(?:[ab]{1000}c){100}", "too many states; lower"),
    "a catastrophe": ("(?:a|b)*a(?:a|b){24}", "too many states; lower"),
    "a pattern of a million": ("(?:[ab]{2000}){2000}", "too long; lower"),
    "plane 16": ("\U00100001", "no text matches"),
}


@pytest.mark.parametrize("what", BAD)
def test_expressions_that_cannot_be_used(what: str) -> None:
    expression, message = BAD[what]
    began = time.process_time()
    with pytest.raises(dg.GrammarError, match=message):
        compiled(dg.Regex(expression))
    assert time.process_time() - began < 20, "a catastrophic pattern is given up"


def test_arguments() -> None:
    for wrong in ([], "ab", [1]):
        with pytest.raises(ValueError, match="choices"):
            dg.Choice(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expression"):
        dg.Regex(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_depth"):
        dg.JsonSchema(True, max_depth=0)


def test_compiled_grammars_are_kept_by_grammar_and_tokenizer() -> None:
    tokenizer = dg.Tokenizer.from_directory(demo.checkpoint(6))
    one = compile_grammar(dg.Choice(["12", "21"]), tokenizer, 384, (106,), 0)
    assert compile_grammar(dg.Choice(["12", "21"]), tokenizer, 384, (106,), 0) is one
    assert compile_grammar(dg.Choice(["12", "22"]), tokenizer, 384, (106,), 0) is not one
    ids = tokenizer.encode("21")
    assert one.after(one.walk(one.start, ids), 106) == one.end


def test_other_threads_go_on_while_a_grammar_is_compiled() -> None:
    properties = {f"key {number}": {"type": "integer"} for number in range(300)}
    grammar = dg.JsonSchema({"type": "object", "properties": properties})
    tokenizer = dg.Tokenizer.from_directory(demo.checkpoint(6))
    assert turns_during(lambda: compile_grammar(grammar, tokenizer, 384, (106,), 0)) > 100


def test_the_bytes_of_a_tokenizers_tokens() -> None:
    tokenizer = dg.Tokenizer.from_directory(demo.checkpoint(9))
    texts = tokenizer.token_bytes()
    assert len(texts) == tokenizer.vocab_size
    for token, text in enumerate(texts):
        assert (text is None) == (token in tokenizer.special_ids)
        if text is not None and text.isascii():
            assert tokenizer.decode([token]) == text.decode()
    ids = tokenizer.encode("A wörd, 12 日\n")
    assert b"".join(texts[token] or b"?" for token in ids).decode() == "A wörd, 12 日\n"


def test_the_command_tells_what_a_grammar_becomes(tmp_path: Path) -> None:
    schema, tools = tmp_path / "schema.json", tmp_path / "tools.json"
    schema.write_text(json.dumps(SCHEMAS["person"][0]))
    tools.write_text(json.dumps([LOOK]))
    for arguments, grammar, valid in (
        (
            [str(schema)],
            dg.JsonSchema(SCHEMAS["person"][0]),
            lambda text: jsonschema.validate(json.loads(text), SCHEMAS["person"][0]),
        ),
        (["--regex", "a{3}b*"], dg.Regex("a{3}b*"), re.compile("a{3}b*").fullmatch),
        (["--choice", "x", "--choice", "y"], dg.Choice(["x", "y"]), lambda text: text in "xy"),
        (
            ["--tools", str(tools)],
            dg.ToolCalls([LOOK], "required"),
            lambda text: text.startswith("<|tool_call>call:look{"),
        ),
        (["--tools", str(tools), "--tool-choice", "auto"], dg.ToolCalls([LOOK]), lambda text: True),
    ):
        run = dgemma("grammar", *arguments, "--model", "6x6", "--json")
        assert run.code == 0, run.err
        found, tokenizer = run.object, dg.Tokenizer.from_directory(demo.checkpoint(6))
        compiled = compile_grammar(grammar, tokenizer, 384, (1, 106, 50), 0)
        assert [found[name] for name in ("states", "arcs", "bytes")] == [
            compiled.states,
            compiled.arcs,
            compiled.nbytes,
        ]
        assert found["shortest_tokens"] == compiled.shortest
        assert len(found["walks"]) == 10
        for text in (found["shortest"], *found["walks"]):
            assert valid(text) is not False
        lines = dgemma("grammar", *arguments, "--model", "6x6").out.splitlines()
        assert lines[0].startswith(
            f"{compiled.states} states, {compiled.num_classes} classes of tokens, {compiled.arcs} arcs"
        )
        assert len(lines) == 13


def test_the_command_names_what_it_refuses(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"a/b": {"type": "array", "uniqueItems": True}}}))
    for arguments, message in (
        ([str(schema)], "#/properties/a~1b: uniqueItems: is not supported for array"),
        (["--regex", "(?=a)b"], "no automaton follows"),
        ([str(schema), "--regex", "a"], "one of FILE.json, --regex, --choice and --tools is wanted"),
        ([], "one of FILE.json, --regex, --choice and --tools is wanted"),
        (["no.json"], "no.json cannot be read"),
    ):
        run = dgemma("grammar", *arguments)
        assert run.code == 2
        assert message in run.err
