"""What an answer must match: a regular expression, a JSON schema, one of some texts, or calls of tools."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Self

from dgemma_ext import arguments
from dgemma_ext.checkpoint import Response, Tokenizer, checked_tools
from dgemma_ext.errors import GrammarError
from dgemma_ext.sampling.grammar.compiled import CompiledGrammar, compile_pattern, with_end_after
from dgemma_ext.sampling.grammar.json_text import JsonLayout
from dgemma_ext.sampling.grammar.pattern import ANY, Pattern, concat, literal, optional, repeat, union
from dgemma_ext.sampling.grammar.regex import full_match
from dgemma_ext.sampling.grammar.schema import schema_pattern
from dgemma_ext.sampling.grammar.thinking import THINKING, closing_distances, with_thought
from dgemma_ext.sampling.grammar.tool_text import CALL_END, RESPONSE, calls_pattern
from dgemma_ext.sampling.grammar.vocabulary import tokenizer_vocabulary

_MOST_DEPTH = 8
# Compiled grammars that are kept. One takes a megabyte at a vocabulary of 262,144, most of it the class of each token.
_KEPT = 64
_NO_MARKERS: Mapping[str, int] = {}


@dataclass(frozen=True)
class Grammar:
    """What an answer must match: dg.Regex, dg.JsonSchema, dg.Choice or dg.ToolCalls. Two that are equal compile to the
    same.

    thinking: what may stand before the answer. "auto": a thought where the prompt lets the model think (it has
    <|think|>, or ends in a thought), else at most the empty one that models write; "none": at most the empty one;
    "required": a thought. Where the chat template does not spell the markers of thoughts, there is no empty one either.
    thinking_budget: tokens of the answer, markers included, after which no thought is open; None: as many as leave room
    for the shortest text that matches.
    """

    thinking: str = field(default="auto", kw_only=True)
    thinking_budget: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        arguments.choice("thinking", self.thinking, THINKING)
        if self.thinking_budget is not None:
            budget = arguments.integer("thinking_budget", self.thinking_budget, least=1)
            object.__setattr__(self, "thinking_budget", budget)

    def pattern(self, markers: Mapping[str, int] = _NO_MARKERS) -> Pattern:
        """The pattern of the answer without thoughts. markers: the special tokens by their text."""
        raise NotImplementedError

    def parse(self, response: Response) -> Any:
        """The value of an answer that matches."""
        return response.text

    def is_open(self, response: Response) -> bool:
        """Whether an answer that matches is text which may say more where the grammar lets it go on."""
        return False

    def with_thinking_budget(self, budget: int | None) -> Self:
        """The same grammar with another budget of thoughts."""
        return self._with(thinking_budget=budget)

    def _with(self, **values: Any) -> Self:
        found = copy.copy(self)
        found._set(**values)
        Grammar.__post_init__(found)
        return found

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Regex(Grammar):
    """Texts that a regular expression matches from their first to their last character.

    The syntax is that of Python's `re`, without what no automaton follows (look-around, back-references) and without
    flags but (?s); \\d, \\w and \\s are those of ASCII. What cannot be used raises GrammarError when it is compiled.
    """

    expression: str

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.text("expression", self.expression)

    def pattern(self, markers: Mapping[str, int] = _NO_MARKERS) -> Pattern:
        return full_match(self.expression)

    def is_open(self, response: Response) -> bool:
        return True


@dataclass(frozen=True, init=False)
class JsonSchema(Grammar):
    """JSON texts that are valid by a schema: a mapping, its JSON text, or True for any value.

    An object has its properties in the schema's order, and no others. whitespace: "flexible" as models write it, or
    "compact". max_depth: how often a schema may recur in itself, and how deep a value of any type is nested. Keywords
    that it does not rule raise GrammarError with the JSON pointer, when it is compiled.
    """

    schema: str
    whitespace: str = "flexible"
    max_depth: int = 3

    def __init__(
        self,
        schema: Mapping[str, Any] | str | bool,
        whitespace: str = "flexible",
        max_depth: int = 3,
        *,
        thinking: str = "auto",
        thinking_budget: int | None = None,
    ) -> None:
        self._set(
            schema=schema if isinstance(schema, str) else _json_text("schema", schema),
            whitespace=arguments.choice("whitespace", whitespace, ("flexible", "compact")),
            max_depth=arguments.integer("max_depth", max_depth, least=1, end=_MOST_DEPTH + 1),
            thinking=thinking,
            thinking_budget=thinking_budget,
        )
        super().__post_init__()

    def pattern(self, markers: Mapping[str, int] = _NO_MARKERS) -> Pattern:
        try:
            schema = json.loads(self.schema)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"schema is not JSON: {error}") from error
        return schema_pattern(schema, JsonLayout(self.whitespace == "flexible"), self.max_depth)

    def parse(self, response: Response) -> Any:
        return json.loads(response.text)


@dataclass(frozen=True, init=False)
class Choice(Grammar):
    """One of some texts."""

    choices: tuple[str, ...]

    def __init__(self, choices: Sequence[str], *, thinking: str = "auto", thinking_budget: int | None = None) -> None:
        texts = arguments.sequence("choices", choices, "a list of texts")
        if not texts:
            raise ValueError("choices is empty")
        found = tuple(arguments.text(f"choices[{index}]", text) for index, text in enumerate(texts))
        self._set(choices=found, thinking=thinking, thinking_budget=thinking_budget)
        super().__post_init__()

    def pattern(self, markers: Mapping[str, int] = _NO_MARKERS) -> Pattern:
        return union(literal(text) for text in self.choices)


@dataclass(frozen=True, init=False)
class ToolCalls(Grammar):
    """Calls of tools as Gemma 4 writes them, whose arguments are valid by the tools' schemas.

    tools: JSON schemas of functions, as `generate` takes them. choice: "auto", text and then calls, or either alone;
    "required", calls alone; or the name of the one tool that is called. parallel: whether several calls may follow each
    other. text: with "auto", a grammar for what is written where no tool is called; there is then either a text or
    calls. max_depth: as in JsonSchema. Keywords that it does not rule raise GrammarError with the JSON pointer into the
    list of tools, when it is compiled. An answer that ends after a call ends by <|tool_response>, where the checkpoint
    has that among its end-of-sequence tokens.
    """

    tools: str
    choice: str = "auto"
    parallel: bool = True
    text: Grammar | None = None
    max_depth: int = 3

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str = "auto",
        parallel: bool = True,
        text: Grammar | None = None,
        max_depth: int = 3,
        *,
        thinking: str = "auto",
        thinking_budget: int | None = None,
    ) -> None:
        checked = checked_tools(tools)
        if not checked:
            raise ValueError("tools is empty")
        names = [tool["function"]["name"] for tool in checked]
        for index, name in enumerate(names):
            if name != name.strip() or "\0" in name or name in names[:index]:
                wanted = "a name of its own, without white space around it"
                raise arguments.refusal(f"tools[{index}]['function']['name']", wanted, name)
        arguments.choice("choice", choice, ("auto", "required", *names))
        if text is not None and choice != "auto":
            raise ValueError(f"text is for the choice auto, got the choice {choice!r}")
        if text is not None:
            arguments.instance("text", text, Grammar, "a grammar or None")
        self._set(
            tools=_json_text("tools", checked),
            choice=choice,
            parallel=arguments.flag("parallel", parallel),
            text=text,
            max_depth=arguments.integer("max_depth", max_depth, least=1, end=_MOST_DEPTH + 1),
            thinking=thinking,
            thinking_budget=thinking_budget,
        )
        super().__post_init__()

    def pattern(self, markers: Mapping[str, int] = _NO_MARKERS) -> Pattern:
        tools = json.loads(self.tools)
        if self.choice not in ("auto", "required"):
            tools = [tool for tool in tools if tool["function"]["name"] == self.choice]
        calls = calls_pattern(tools, self.parallel, self.max_depth, markers)
        if self.text is not None:
            return union([self.text.pattern(markers), calls])
        return concat(repeat(ANY), optional(calls)) if self.choice == "auto" else calls

    def parse(self, response: Response) -> Any:
        """A list of (name, arguments); of an answer without calls what its text says."""
        if response.tool_calls:
            return [(call.name, call.arguments) for call in response.tool_calls]
        return response.text if self.text is None else self.text.parse(response)

    def is_open(self, response: Response) -> bool:
        return not response.tool_calls and (self.text is None or self.text.is_open(response))


def _json_text(name: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"{name} is not JSON: {error}") from error


def compile_grammar(
    grammar: Grammar,
    tokenizer: Tokenizer,
    vocabulary_size: int,
    end_ids: tuple[int, ...],
    pad_id: int | None,
    thinks: bool = False,
) -> CompiledGrammar:
    """The automaton of a grammar over a tokenizer's tokens; the last ones are kept. Raises GrammarError.

    thinks: whether the prompt lets the model think.
    """
    answer = grammar._with(thinking="auto", thinking_budget=None)  # budgets are no part of the automaton
    may_think = thinks and grammar.thinking == "auto"
    return _compile(answer, grammar.thinking, may_think, tokenizer, vocabulary_size, end_ids, pad_id)


@lru_cache(maxsize=_KEPT)
def _compile(
    answer: Grammar,
    thinking: str,
    thinks: bool,
    tokenizer: Tokenizer,
    vocabulary_size: int,
    end_ids: tuple[int, ...],
    pad_id: int | None,
) -> CompiledGrammar:
    vocabulary = tokenizer_vocabulary(tokenizer, vocabulary_size)
    markers = {text: token for text, token in tokenizer.markers.items() if token < vocabulary_size}
    pattern = answer.pattern(markers)
    if tokenizer.knows_thoughts or thinks or thinking == "required":
        pattern = with_thought(pattern, thinking, thinks, markers)
    compiled = compile_pattern(pattern, vocabulary, end_ids, pad_id)
    if isinstance(answer, ToolCalls) and markers.get(RESPONSE) in end_ids:
        compiled = with_end_after(compiled, markers[CALL_END], markers[RESPONSE])
    return replace(compiled, closing=closing_distances(compiled, markers))
