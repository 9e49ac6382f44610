"""Patterns of texts: trees in the words that csrc/automaton/byte_automaton.h describes.

A pattern is a list of integers. It describes texts in UTF-8. The characters of plane 16 stand for special tokens
(`symbol`), so no text has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dgemma_ext.errors import GrammarError

Pattern = list[int]

_CHARACTERS, _BYTES, _CONCAT, _UNION, _REPEAT, _LIST, _FIELDS = range(7)

# U+100000 + id stands for a special token: private use, which no text needs.
SYMBOLS = 0x100000
LARGEST_SYMBOL = 0xFFFF
# The first byte of such a character, which no other has.
SYMBOL_BYTE = 0xF4
# The last character that a text may have.
LAST = 0xFFFFF

EMPTY: Pattern = [_CONCAT, 0]


def characters(*ranges: tuple[int, int] | str) -> Pattern:
    """One character of some ranges (first and last code point), or of some strings; of plane 16 there are none."""
    pairs = [r for part in ranges for r in ([part] if isinstance(part, tuple) else [(ord(c), ord(c)) for c in part])]
    pairs = [(first, min(last, LAST)) for first, last in pairs if first <= LAST]
    return [_CHARACTERS, len(pairs), *(point for pair in pairs for point in pair)]


def literal(text: str | bytes) -> Pattern:
    """A text as it is. Raises GrammarError for one with a lone surrogate or a character of plane 16."""
    if isinstance(text, str):
        try:
            text = text.encode()
        except UnicodeEncodeError as error:
            raise GrammarError(f"{text[:60]!a} has a lone surrogate, which UTF-8 cannot hold") from error
        if SYMBOL_BYTE in text:
            raise GrammarError("a text has a character of plane 16 (U+100000 and above), which no grammar has")
    return [_BYTES, len(text), *text]


def concat(*parts: Pattern) -> Pattern:
    return [_CONCAT, len(parts), *(word for part in parts for word in part)]


def union(parts: Iterable[Pattern]) -> Pattern:
    parts = list(parts)
    return [_UNION, len(parts), *(word for part in parts for word in part)]


def repeat(part: Pattern, least: int = 0, most: int | None = None) -> Pattern:
    return [_REPEAT, least, -1 if most is None else most, *part]


def optional(part: Pattern) -> Pattern:
    return repeat(part, 0, 1)


def separated(item: Pattern, separator: Pattern, least: int = 0, most: int | None = None) -> Pattern:
    """Least to most items with the separator between them."""
    return [_LIST, least, -1 if most is None else most, *separator, *item]


def fields(items: Sequence[tuple[bool, Pattern]], separator: Pattern) -> Pattern:
    """Items in order, with the separator between those that are there; an item is (required, pattern)."""
    return [_FIELDS, len(items), *separator, *(word for required, item in items for word in (int(required), *item))]


def symbol(token: int) -> Pattern:
    """A special token."""
    if token > LARGEST_SYMBOL:
        raise GrammarError(
            f"the special token {token} has too large an id for a grammar, which takes ids to {LARGEST_SYMBOL}"
        )
    return literal(chr(SYMBOLS + token).encode())


# One character of a text.
ANY = characters((0, LAST))
