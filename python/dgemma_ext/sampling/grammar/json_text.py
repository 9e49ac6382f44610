"""Patterns of JSON: strings, numbers, literals and white space.

White space is bounded, so that a model that is unsure cannot stall in it: after an opening bracket, after a comma and
before a closing bracket a space, or a line break with at most twelve spaces; after a colon a space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dgemma_ext.sampling.grammar.pattern import (
    EMPTY,
    LAST,
    Pattern,
    characters,
    concat,
    fields,
    literal,
    optional,
    repeat,
    separated,
    union,
)

_DIGIT = characters((0x30, 0x39))
_DIGIT_1_9 = characters((0x31, 0x39))
_HEX = characters((0x30, 0x39), (0x41, 0x46), (0x61, 0x66))
_FIRST_BUT_D = characters((0x30, 0x39), (0x41, 0x43), (0x45, 0x46), (0x61, 0x63), (0x65, 0x66))
# The four digits of an escape, without surrogates, which are halves of characters.
_ESCAPED_CODE = union(
    [
        concat(_FIRST_BUT_D, repeat(_HEX, 3, 3)),
        concat(characters("dD"), characters((0x30, 0x37)), repeat(_HEX, 2, 2)),
    ]
)
_RAW = characters((0x20, 0x21), (0x23, 0x5B), (0x5D, LAST))
_ESCAPES = union([characters('"\\/bfnrt'), concat(literal("u"), _ESCAPED_CODE)])
# A character of a string, however it is written.
CHARACTER = union([_RAW, concat(literal("\\"), _ESCAPES)])

BOOLEAN = union([literal("true"), literal("false")])
NULL = literal("null")
_FRACTION = concat(literal("."), repeat(_DIGIT, 1, 17))
_EXPONENT = concat(characters("eE"), optional(characters("+-")), repeat(_DIGIT, 1, 2))
_WHOLE = union([literal("0"), concat(_DIGIT_1_9, repeat(_DIGIT, 0, 17))])
INTEGER = concat(optional(literal("-")), _WHOLE)
NUMBER = concat(INTEGER, optional(_FRACTION), optional(_EXPONENT))


class JsonLayout:
    """How values are written: with white space as models and people write it, or with none.

    character: one of a string, however it is written.
    """

    character = CHARACTER

    def __init__(self, flexible: bool) -> None:
        break_or_space = concat(literal("\n"), repeat(literal(" "), 0, 12))
        self._gap = optional(union([literal(" "), break_or_space])) if flexible else EMPTY
        self._after_colon = optional(literal(" ")) if flexible else EMPTY
        self._comma = concat(literal(","), self._gap)

    def quoted(self, content: Pattern) -> Pattern:
        """The string with this content."""
        return concat(literal('"'), content, literal('"'))

    @property
    def string(self) -> Pattern:
        return self.quoted(repeat(self.character))

    def written(self, ranges: list[tuple[int, int]]) -> Pattern:
        """One character of the ranges as a string has it."""
        return written(ranges)

    def text(self, text: str) -> Pattern:
        """The string of a text."""
        return literal(json.dumps(text, ensure_ascii=False))

    def key(self, name: str) -> Pattern:
        return concat(self.text(name), literal(":"), self._after_colon)

    def any_key(self) -> Pattern:
        return concat(self.string, literal(":"), self._after_colon)

    def in_order(self, members: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """The members of an object in the order in which they are written."""
        return list(members.items())

    def object(self, members: Sequence[tuple[bool, Pattern]]) -> Pattern:
        """Members in order, each (required, key and value)."""
        if not members:
            return concat(literal("{"), self._gap, literal("}"))
        return concat(literal("{"), self._gap, fields(members, self._comma), self._gap, literal("}"))

    def map(self, value: Pattern) -> Pattern:
        """An object with any keys."""
        return self._enclosed("{", separated(concat(self.any_key(), value), self._comma), "}")

    def array(self, item: Pattern, least: int = 0, most: int | None = None) -> Pattern:
        return self._enclosed("[", separated(item, self._comma, least, most), "]")

    def tuple(self, items: Sequence[Pattern]) -> Pattern:
        return self._enclosed("[", fields([(True, item) for item in items], self._comma), "]")

    def _enclosed(self, opening: str, content: Pattern, closing: str) -> Pattern:
        return concat(literal(opening), self._gap, content, self._gap, literal(closing))

    def value(self, value: Any) -> Pattern:
        """The text of a value."""
        if isinstance(value, dict):
            members = self.in_order(value)
            return self.object([(True, concat(self.key(name), self.value(part))) for name, part in members])
        if isinstance(value, list):
            return self.tuple([self.value(part) for part in value])
        if isinstance(value, str):
            return self.text(value)
        return literal(json.dumps(value, ensure_ascii=False))

    def any_value(self, depth: int) -> Pattern:
        """Any value, with objects and arrays nested to `depth`."""
        plain = [self.string, NUMBER, BOOLEAN, NULL]
        if depth == 0:
            return union(plain)
        inner = self.any_value(depth - 1)
        return union([*plain, self.map(inner), self.array(inner)])


# Ranges of numbers ----------------------------------------------------------------------------------------------------


def integers_between(least: int | None, most: int | None) -> Pattern:
    """Integers in [least, most], without leading zeros; where a bound is missing, of at most eighteen digits."""
    least = -(10**18 - 1) if least is None else least
    most = 10**18 - 1 if most is None else most
    parts = []
    if least < 0:
        parts.append(concat(literal("-"), _whole_between(max(1, -most), -least)))
    if most >= 0:
        parts.append(_whole_between(max(least, 0), most))
    return union(parts)


def _whole_between(least: int, most: int) -> Pattern:
    parts = []
    for length in range(len(str(least)), len(str(most)) + 1):
        low = max(least, 10 ** (length - 1) if length > 1 else 0)
        parts.append(_digits_between(str(low), str(min(most, 10**length - 1))))
    return union(parts)


def _digits_between(low: str, high: str) -> Pattern:
    """Strings of digits of one length, from low to high."""
    if low == high:
        return literal(low)
    if len(low) == 1:
        return characters((ord(low), ord(high)))
    rest = len(low) - 1
    if low[0] == high[0]:
        return concat(literal(low[0]), _digits_between(low[1:], high[1:]))
    parts, first, last = [], int(low[0]), int(high[0])
    if low[1:] != "0" * rest:
        parts.append(concat(literal(low[0]), _digits_between(low[1:], "9" * rest)))
        first += 1
    if high[1:] != "9" * rest:
        parts.append(concat(literal(high[0]), _digits_between("0" * rest, high[1:])))
        last -= 1
    if first <= last:
        parts.append(concat(characters((0x30 + first, 0x30 + last)), repeat(_DIGIT, rest, rest)))
    return union(parts)


# At most six digits after the point beside a bound: a double tells such numbers from it, up to LARGEST_OPEN_BOUND.
LARGEST_OPEN_BOUND = 10**9
_SHORT_FRACTION = concat(literal("."), repeat(_DIGIT, 1, 6))
_NOT_ZERO = concat(
    literal("."), union(concat(literal("0" * zeros), _DIGIT_1_9, repeat(_DIGIT, 0, 5 - zeros)) for zeros in range(6))
)
_ZEROS = concat(literal("."), repeat(literal("0"), 1, 6))
_LARGEST = 10**18 - 1

# A bound of numbers and whether it is left out itself.
Bound = tuple[int, bool]


def numbers_between(low: Bound | None, high: Bound | None) -> Pattern:
    """Numbers between whole bounds, without exponents; where a bound is missing, of at most eighteen digits before the
    point."""
    least, least_open = low or (-_LARGEST, False)
    most, most_open = high or (_LARGEST, False)
    parts = []
    if most > 0 or (most == 0 and not most_open and (least < 0 or not least_open)):
        parts.append(_magnitudes(*((least, least_open) if least >= 0 else (0, False)), most, most_open))
    if least < 0:
        nearest = (-most, most_open) if most <= 0 else (0, False)
        parts.append(concat(literal("-"), _magnitudes(*nearest, -least, least_open)))
    return union(parts)


def _magnitudes(low: int, low_open: bool, high: int, high_open: bool) -> Pattern:
    parts = []
    if low < high:
        if low_open:
            parts.append(concat(literal(str(low)), _NOT_ZERO))
        first = low + 1 if low_open else low
        if first < high:
            parts.append(concat(_whole_between(first, high - 1), optional(_SHORT_FRACTION)))
    if not high_open and (low < high or not low_open):
        parts.append(concat(literal(str(high)), optional(_ZEROS)))
    return union(parts)


# Texts inside a string ------------------------------------------------------------------------------------------------

_SHORT_ESCAPES = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}
# What a string holds as it is.
_AS_IT_IS = ((0x20, 0x21), (0x23, 0x5B), (0x5D, LAST))


def written(ranges: list[tuple[int, int]]) -> Pattern:
    """One character of the ranges as a string has it: quotes, backslashes and control characters are escaped."""
    plain = [
        (max(first, low), min(last, high))
        for first, last in ranges
        for low, high in _AS_IT_IS
        if max(first, low) <= min(last, high)
    ]
    points = [point for point in (*range(0x20), 0x22, 0x5C) if any(first <= point <= last for first, last in ranges)]
    escapes = [literal("\\" + _SHORT_ESCAPES.get(point, f"u{point:04x}")) for point in points]
    return union([characters(*plain), *escapes])
