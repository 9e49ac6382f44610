"""Patterns of tool calls as Gemma 4 writes them: `<|tool_call>call:NAME{city:<|"|>Rome<|"|>,days:2}<tool_call|>`.

The arguments are JSON but for this: a string stands between two tokens `<|"|>` and is not escaped, keys are bare, there
is no white space, and members are sorted by their names without regard to case, because the chat template writes the
calls of a conversation so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dgemma_ext.errors import GrammarError
from dgemma_ext.sampling.grammar.json_text import JsonLayout
from dgemma_ext.sampling.grammar.pattern import (
    ANY,
    EMPTY,
    Pattern,
    characters,
    concat,
    literal,
    repeat,
    separated,
    symbol,
    union,
)
from dgemma_ext.sampling.grammar.schema import describes_objects, schema_pattern

CALL, CALL_END, RESPONSE, QUOTE = "<|tool_call>", "<tool_call|>", "<|tool_response>", '<|"|>'

# Names that are bare; others stand between quotes.
_BARE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_BARE_PATTERN = concat(
    characters((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), "_"),
    repeat(characters((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), "_.-")),
)


class ToolCallLayout(JsonLayout):
    """quote: the id of the token that encloses strings."""

    character = ANY

    def __init__(self, quote: int) -> None:
        super().__init__(flexible=False)
        self._quote = symbol(quote)

    def quoted(self, content: Pattern) -> Pattern:
        return concat(self._quote, content, self._quote)

    def written(self, ranges: list[tuple[int, int]]) -> Pattern:
        return characters(*ranges)

    def text(self, text: str) -> Pattern:
        return self.quoted(literal(text))

    def key(self, name: str) -> Pattern:
        return concat(literal(name) if _BARE.fullmatch(name) else self.text(name), literal(":"))

    def any_key(self) -> Pattern:
        return concat(union([_BARE_PATTERN, self.string]), literal(":"))

    def in_order(self, members: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return sorted(members.items(), key=lambda member: member[0].lower())


def calls_pattern(
    tools: Sequence[Mapping[str, Any]], several: bool, max_depth: int, markers: Mapping[str, int]
) -> Pattern:
    """One call of one of these tools, or, with `several`, one or more. markers: special tokens by their text.

    Raises GrammarError with the JSON pointer of the tool's schema and the keyword that is not followed.
    """
    missing = [marker for marker in (CALL, CALL_END, QUOTE) if marker not in markers]
    if missing:
        raise GrammarError(f"tool calls need the special token {missing[0]}, which the tokenizer does not have")
    layout = ToolCallLayout(markers[QUOTE])
    functions = union(
        concat(literal(f"call:{tool['function']['name']}"), _arguments(tool["function"], index, layout, max_depth))
        for index, tool in enumerate(tools)
    )
    call = concat(symbol(markers[CALL]), functions, symbol(markers[CALL_END]))
    return separated(call, EMPTY, 1) if several else call


def _arguments(function: Mapping[str, Any], index: int, layout: JsonLayout, max_depth: int) -> Pattern:
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    place = f"/{index}/function/parameters"
    if not describes_objects(parameters):
        raise GrammarError("does not describe an object, as the arguments of a function are", pointer=place)
    return schema_pattern(parameters, layout, max_depth, place)
