"""Special tokens: finding them in text, and keeping a user's text from becoming one.

A chat template writes special tokens and a user's text into one string. `Mask` tells the two apart afterwards: it
replaces the characters with which special tokens begin and end by stand-ins, in the user's text alone, before the
template is rendered. What the template does with its variables (trim, join, test, cut) still works, because a stand-in
is a character like any other, and no cut or join of the user's text can spell a special token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

# Of these a mask takes characters that no text at hand uses: Braille patterns, which are symbols that Python's repr
# leaves as they are, then the private-use characters of the basic plane.
STAND_INS = [chr(code) for code in (*range(0x2800, 0x2900), *range(0xE000, 0xF900))]


class SpecialTokens:
    """The special tokens of a vocabulary. `ids` maps each one's text to its id; `found` are those texts that the
    tokenizer finds in any text by itself."""

    def __init__(self, ids: Mapping[str, int], found: Iterable[str] = ()) -> None:
        self.ids = dict(ids)
        self.edges = frozenset(
            character for text in self.ids for character in (text[0], text[-1]) if not _is_of_words(character)
        )
        # Letters are not masked: a template compares names, and may change their case.
        self.unmaskable = tuple(text for text in self.ids if not self.edges.intersection((text[0], text[-1])))
        self._pattern, self._found = _any_of(self.ids), _any_of(found)

    def split(self, text: str) -> Iterator[str | int]:
        """The pieces of `text` in order: ids of special tokens, and the text between them."""
        end = 0
        for match in self._pattern.finditer(text):
            if match.start() > end:
                yield text[end : match.start()]
            yield self.ids[match.group()]
            end = match.end()
        if end < len(text):
            yield text[end:]

    def cut(self, text: str) -> Iterator[str]:
        """The pieces of `text`, cut so that the tokenizer finds no special token in any of them."""
        begin = end = 0
        while match := self._found.search(text, end):
            end = match.start() + 1
            yield text[begin:end]
            begin = end
        yield text[begin:]


@dataclass(frozen=True)
class Mask:
    """Characters, and as many stand-ins for them in the same order."""

    characters: str
    stand_ins: str

    def hide(self, value: Any) -> Any:
        """JSON data with the stand-ins in every string and key."""
        if isinstance(value, str):
            return value.translate(str.maketrans(self.characters, self.stand_ins))
        if isinstance(value, Mapping):
            return {self.hide(name): self.hide(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return value

    def reveal(self, text: str) -> str:
        """`text` with the characters in place of their stand-ins."""
        return text.translate(str.maketrans(self.stand_ins, self.characters))


def make_masks(characters: Set[str], used: Set[str], count: int) -> list[Mask]:
    """`count` masks of `characters` with different stand-ins, none of which is in `used`.

    Raises ValueError where too few are left.
    """
    free = [character for character in STAND_INS if character not in used]
    width = len(characters)
    if len(free) < count * width:
        raise ValueError(
            "messages use nearly all of Unicode's Braille and private-use characters; some must be left free"
        )
    hidden = "".join(sorted(characters))
    return [Mask(hidden, "".join(free[index * width : (index + 1) * width])) for index in range(count)]


def strings_of(value: Any) -> Iterator[str]:
    """Every string and key of JSON data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from strings_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)


def is_marker(text: str) -> bool:
    """Whether a token's text is set apart from words, as `<turn|>` is."""
    return len(text) > 2 and not _is_of_words(text[0]) and not _is_of_words(text[-1])


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the longest of the texts; without any it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _is_of_words(character: str) -> bool:
    return character.isalnum() or character.isspace() or character == "_"
