"""What an answer must match: a regular expression, a JSON schema, or one of some texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dgemma_ext import arguments
from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.errors import GrammarError
from dgemma_ext.sampling.grammar.compiled import CompiledGrammar, compile_pattern
from dgemma_ext.sampling.grammar.pattern import Pattern, literal, union
from dgemma_ext.sampling.grammar.regex import full_match
from dgemma_ext.sampling.grammar.schema import schema_pattern
from dgemma_ext.sampling.grammar.vocabulary import tokenizer_vocabulary

_MOST_DEPTH = 8
# Compiled grammars that are kept. One takes a megabyte at a vocabulary of 262,144, most of it the class of each token.
_KEPT = 64


class Grammar:
    """What an answer must match: dg.Regex, dg.JsonSchema or dg.Choice. Two that are equal compile to the same."""

    def pattern(self) -> Pattern:
        raise NotImplementedError

    def parse(self, text: str) -> Any:
        """The value of an answer that matches."""
        return text


@dataclass(frozen=True)
class Regex(Grammar):
    """Texts that a regular expression matches from their first to their last character.

    The syntax is that of Python's `re`, without what no automaton follows (look-around, back-references) and without
    flags but (?s); \\d, \\w and \\s are those of ASCII. What cannot be used raises GrammarError when it is compiled.
    """

    expression: str

    def __post_init__(self) -> None:
        arguments.text("expression", self.expression)

    def pattern(self) -> Pattern:
        return full_match(self.expression)


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
        self, schema: Mapping[str, Any] | str | bool, whitespace: str = "flexible", max_depth: int = 3
    ) -> None:
        if isinstance(schema, str):
            text = schema
        else:
            try:
                text = json.dumps(schema)
            except (TypeError, ValueError, RecursionError) as error:
                raise GrammarError(f"schema is not JSON: {error}") from error
        object.__setattr__(self, "schema", text)
        object.__setattr__(self, "whitespace", arguments.choice("whitespace", whitespace, ("flexible", "compact")))
        object.__setattr__(self, "max_depth", arguments.integer("max_depth", max_depth, least=1, end=_MOST_DEPTH + 1))

    def pattern(self) -> Pattern:
        try:
            schema = json.loads(self.schema)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"schema is not JSON: {error}") from error
        return schema_pattern(schema, self.whitespace == "flexible", self.max_depth)

    def parse(self, text: str) -> Any:
        return json.loads(text)


@dataclass(frozen=True, init=False)
class Choice(Grammar):
    """One of some texts."""

    choices: tuple[str, ...]

    def __init__(self, choices: Sequence[str]) -> None:
        texts = arguments.sequence("choices", choices, "a list of texts")
        if not texts:
            raise ValueError("choices is empty")
        found = tuple(arguments.text(f"choices[{index}]", text) for index, text in enumerate(texts))
        object.__setattr__(self, "choices", found)

    def pattern(self) -> Pattern:
        return union(literal(text) for text in self.choices)


@lru_cache(maxsize=_KEPT)
def compile_grammar(
    grammar: Grammar, tokenizer: Tokenizer, vocabulary_size: int, end_ids: tuple[int, ...], pad_id: int | None
) -> CompiledGrammar:
    """The automaton of a grammar over a tokenizer's tokens; the last ones are kept. Raises GrammarError."""
    vocabulary = tokenizer_vocabulary(tokenizer, vocabulary_size)
    return compile_pattern(grammar.pattern(), vocabulary, end_ids, pad_id)
