"""Regular expressions as patterns, in the syntax of Python's `re`.

Python's own parser reads them; what an automaton cannot follow (look-around, back-references, atomic groups) is
refused. \\d, \\w and \\s are those of ASCII, and \\D, \\W and \\S leave out what is a digit, a letter or a space in any
script, so that a text that matches here also matches where they are read either way. `.` is any character but a line
break.
"""

from __future__ import annotations

import re
import re._constants as codes  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from dgemma_ext.errors import GrammarError
from dgemma_ext.sampling.grammar.pattern import EMPTY, LAST, Pattern, characters, concat, repeat, union

_MOST_BYTES = 64 * 1024
_MOST_REPEAT = 20_000

Ranges = list[tuple[int, int]]
# How one character of some ranges is written.
Writer = Callable[[Ranges], Pattern]


def full_match(expression: str) -> Pattern:
    """The texts that the expression matches from their first to their last character. Raises GrammarError."""
    return _Translation(expression, lambda ranges: characters(*ranges)).pattern(anywhere=None)


def search(expression: str, write: Writer, any_character: Pattern) -> Pattern:
    """The texts in which the expression matches somewhere, written in another way. Raises GrammarError."""
    return _Translation(expression, write).pattern(anywhere=repeat(any_character))


class _Translation:
    def __init__(self, expression: str, write: Writer) -> None:
        size = len(expression.encode())
        if size > _MOST_BYTES:
            raise GrammarError(f"the expression has {size} bytes, more than the limit of {_MOST_BYTES}; shorten it")
        try:
            with warnings.catch_warnings(action="ignore"):  # of sets that look like operations on sets
                self._tree: Any = parser.parse(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise GrammarError(f"the expression {expression[:60]!r} cannot be read: {error}") from error
        flags = self._tree.state.flags & ~re.UNICODE.value
        self._dot_all = bool(flags & re.DOTALL.value)
        if flags & ~re.DOTALL.value:
            raise GrammarError(f"the expression {expression[:60]!r} has flags; only (?s) is supported")
        self._write = write

    def pattern(self, anywhere: Pattern | None) -> Pattern:
        """anywhere: what may stand before and after a match, where no anchor forbids it."""
        return self._whole(list(self._tree), anywhere, self._dot_all)

    def _whole(self, items: list[Any], around: Pattern | None, dot_all: bool) -> Pattern:
        """A whole expression or one of its outermost alternatives, whose ends may be anchors."""
        if len(items) == 1 and items[0][0] is codes.SUBPATTERN:
            _, added, removed, inner = items[0][1]
            return self._whole(list(inner), around, self._flags(added, removed, dot_all))
        if len(items) == 1 and items[0][0] is codes.BRANCH:
            return union(self._whole(list(one), around, dot_all) for one in items[0][1][1])
        before = after = EMPTY if around is None else around
        while items and items[0] in ((codes.AT, codes.AT_BEGINNING), (codes.AT, codes.AT_BEGINNING_STRING)):
            items, before = items[1:], EMPTY
        while items and items[-1] in ((codes.AT, codes.AT_END), (codes.AT, codes.AT_END_STRING)):
            items, after = items[:-1], EMPTY
        if len(items) == 1 and items[0][0] in (codes.SUBPATTERN, codes.BRANCH) and before == after:
            # The anchors of ^(a|b)$ are those of its alternatives.
            return self._whole(items, None if before == EMPTY else around, dot_all)
        return concat(before, self._sequence(items, dot_all), after)

    def _sequence(self, items: Iterable[Any], dot_all: bool) -> Pattern:
        return concat(*(self._item(code, argument, dot_all) for code, argument in items))

    def _item(self, code: Any, argument: Any, dot_all: bool) -> Pattern:
        if code is codes.LITERAL:
            return self._write([(argument, argument)])
        if code is codes.NOT_LITERAL:
            return self._write(_others([(argument, argument)]))
        if code is codes.ANY:
            return self._write([(0, LAST)] if dot_all else _others([(0x0A, 0x0A)]))
        if code is codes.IN:
            return self._write(_set(argument))
        if code is codes.BRANCH:
            return union(self._sequence(one, dot_all) for one in argument[1])
        if code is codes.SUBPATTERN:
            _, added, removed, inner = argument
            return self._sequence(inner, self._flags(added, removed, dot_all))
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, inner = argument
            most = None if most is codes.MAXREPEAT else int(most)
            if max(least, most or 0) > _MOST_REPEAT:
                raise GrammarError(f"the expression repeats {max(least, most or 0)} times; lower it to {_MOST_REPEAT}")
            return repeat(self._sequence(inner, dot_all), int(least), most)
        name = str(code).lower().replace("_", " ")
        raise GrammarError(f"the expression has what no automaton follows, or an anchor inside: {name}")

    def _flags(self, added: int, removed: int, dot_all: bool) -> bool:
        if (added | removed) & ~(re.DOTALL.value | re.UNICODE.value):
            raise GrammarError("the expression has flags; only (?s) is supported")
        return (dot_all or bool(added & re.DOTALL.value)) and not removed & re.DOTALL.value


def _set(items: list[Any]) -> Ranges:
    ranges: Ranges = []
    negated = False
    for code, argument in items:
        if code is codes.NEGATE:
            negated = True
        elif code is codes.LITERAL:
            ranges.append((argument, argument))
        elif code is codes.RANGE:
            ranges.append((argument[0], argument[1]))
        elif code is codes.CATEGORY:
            # In [^\\d] what is left out is a digit of any script.
            ranges += _category(argument, wide=negated)
        else:
            raise GrammarError(f"the expression has a set that is not supported: {code}")
    return _others(ranges) if negated else ranges


_ASCII = {
    codes.CATEGORY_DIGIT: [(0x30, 0x39)],
    codes.CATEGORY_WORD: [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    codes.CATEGORY_SPACE: [(0x09, 0x0D), (0x20, 0x20)],
}
_OPPOSITE = {
    codes.CATEGORY_NOT_DIGIT: codes.CATEGORY_DIGIT,
    codes.CATEGORY_NOT_WORD: codes.CATEGORY_WORD,
    codes.CATEGORY_NOT_SPACE: codes.CATEGORY_SPACE,
}
_IS_WIDE: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    codes.CATEGORY_SPACE: lambda c: c.isspace() or c == "\ufeff",
}


def _category(category: Any, wide: bool) -> Ranges:
    """wide: the characters that are of it in any script, and for an opposite those that are so in none but ASCII."""
    if category in _OPPOSITE:
        of = _OPPOSITE[category]
        return _others(_ASCII[of] if wide else _wide(of))
    if category not in _ASCII:
        raise GrammarError(f"the expression has a category that is not supported: {category}")
    return _wide(category) if wide else _ASCII[category]


@lru_cache
def _wide(category: Any) -> Ranges:
    """The ranges of all characters of a category: one look at each character."""
    belongs, ranges = _IS_WIDE[category], list[tuple[int, int]]()
    for point in range(LAST + 1):
        if belongs(chr(point)):
            if ranges and ranges[-1][1] + 1 == point:
                ranges[-1] = (ranges[-1][0], point)
            else:
                ranges.append((point, point))
    return ranges


def _others(ranges: Ranges) -> Ranges:
    """All characters that are not in the ranges."""
    found, begin = list[tuple[int, int]](), 0
    for first, last in sorted(ranges):
        if begin < first:
            found.append((begin, first - 1))
        begin = max(begin, last + 1)
    if begin <= LAST:
        found.append((begin, LAST))
    return found
