"""Reads a tool call of Gemma 4: `call:NAME{KEY:VALUE,...}`.

Values are written as in JSON, but a string stands between two tokens `<|"|>` and is not escaped, and keys are bare.
Models also write JSON's strings, and Python's literals and single quotes; these are read too.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

# Deeper calls are refused before Python's own limit on recursion (1,000 by default) is near.
_MAX_DEPTH = 100

# Stands for a string in the text around the strings; text that has it is refused.
_STRING = "\0"

_SPACE = re.compile(r"\s*")
_BARE_KEY = re.compile(r"[^:\0]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![\w.+-])")
_WORD = re.compile(r"\w+")
_QUOTED = re.compile(r'"(?:[^"\\\0]|\\[^\0])*"|' + r"'(?:[^'\\\0\n]|\\[^\0])*'")
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for: the tool's name, and the arguments as JSON values."""

    name: str
    arguments: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class InvalidToolCall:
    """A call that cannot be read: its text as the model wrote it, with its markers, and what is wrong with it."""

    text: str
    error: str


class ToolCallSyntaxError(Exception):
    """What is wrong with a call, in words for the caller."""


def parse_tool_call(pieces: Sequence[str]) -> ToolCall:
    """The call that `pieces` spell: what stands between string delimiters, so that every second piece is a string.

    Raises ToolCallSyntaxError.
    """
    if len(pieces) % 2 == 0:
        raise ToolCallSyntaxError("a string is not closed")
    if any(_STRING in syntax for syntax in pieces[0::2]):
        raise ToolCallSyntaxError("it has a NUL outside of its strings")
    return _Parser(_STRING.join(pieces[0::2]), pieces[1::2]).call()


class _Parser:
    """Recursive descent over the text around the strings."""

    def __init__(self, text: str, strings: Sequence[str]) -> None:
        self._text = text
        self._at = 0
        self._strings = iter(strings)
        self._depth = 0

    def call(self) -> ToolCall:
        self._skip_space()
        if not self._text.startswith("call:", self._at):
            self._fail("call:")
        brace = self._text.find("{", self._at)
        name = self._text[self._at + len("call:") : brace].strip() if brace >= 0 else ""
        if not name or _STRING in name:
            raise ToolCallSyntaxError("it does not begin with call:NAME{")
        self._at = brace
        arguments = self._object()
        self._skip_space()
        if self._at < len(self._text):
            self._fail("the end of the call")
        return ToolCall(name, arguments)

    def _value(self) -> Any:
        self._skip_space()
        begin = self._text[self._at : self._at + 1]
        if begin == _STRING:
            self._at += 1
            return next(self._strings)
        if begin == "{":
            return self._object()
        if begin == "[":
            return self._array()
        if begin in ('"', "'"):
            return self._quoted()
        if number := _NUMBER.match(self._text, self._at):
            return self._number(number)
        word = _WORD.match(self._text, self._at)
        if word is None or word.group() not in _WORDS:
            self._fail("a value")
        self._at = word.end()
        return _WORDS[word.group()]

    def _object(self) -> dict[str, Any]:
        members: dict[str, Any] = {}
        self._open("{")
        while not self._close("}", is_first=not members):
            key = self._key()
            self._expect(":")
            members[key] = self._value()
        return members

    def _array(self) -> list[Any]:
        items: list[Any] = []
        self._open("[")
        while not self._close("]", is_first=not items):
            items.append(self._value())
        return items

    def _key(self) -> str:
        self._skip_space()
        if self._text.startswith(_STRING, self._at):
            self._at += 1
            return next(self._strings)
        if _QUOTED.match(self._text, self._at):
            return self._quoted()
        bare = _BARE_KEY.match(self._text, self._at)
        if bare is None:
            self._fail("a key")
        self._at = bare.end()
        return bare.group().strip()

    def _quoted(self) -> str:
        match = _QUOTED.match(self._text, self._at)
        if match is None:
            self._fail("a string that ends")
        self._at = match.end()
        text = match.group()
        try:
            # strict=False: a model does not escape the line breaks of a string.
            return str(json.loads(text, strict=False) if text[0] == '"' else ast.literal_eval(text))
        except (ValueError, SyntaxError) as error:
            raise ToolCallSyntaxError(f"the string {text} cannot be read: {error}") from error

    def _number(self, match: re.Match[str]) -> int | float:
        self._at = match.end()
        try:
            value: int | float = json.loads(match.group())
        except ValueError as error:  # an integer of thousands of digits
            raise ToolCallSyntaxError(f"a number cannot be read: {error}") from error
        if math.isinf(value):
            raise ToolCallSyntaxError(f"the number {match.group()} is too large")
        return value

    def _open(self, bracket: str) -> None:
        self._expect(bracket)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ToolCallSyntaxError(f"it is nested deeper than {_MAX_DEPTH} levels")

    def _close(self, bracket: str, is_first: bool) -> bool:
        """Goes on to the next item, or past the closing bracket; returns whether that was it."""
        self._skip_space()
        if self._text.startswith(bracket, self._at):
            self._at += 1
            self._depth -= 1
            return True
        if not is_first:
            self._expect(",")
        return False

    def _expect(self, character: str) -> None:
        self._skip_space()
        if not self._text.startswith(character, self._at):
            self._fail(character)
        self._at += 1

    def _skip_space(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match is not None  # it may be empty
        self._at = match.end()

    def _fail(self, wanted: str) -> NoReturn:
        found = self._text[self._at : self._at + 20].replace(_STRING, '<|"|>')
        raise ToolCallSyntaxError(f"it has {found!r} where {wanted} should be" if found else f"it ends before {wanted}")
