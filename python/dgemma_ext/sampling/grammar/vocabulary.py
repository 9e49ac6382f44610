"""A tokenizer's tokens as byte strings, sorted once for all grammars."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.errors import GrammarError
from dgemma_ext.sampling.grammar.pattern import LARGEST_SYMBOL, SYMBOL_BYTE, SYMBOLS


class Vocabulary(NamedTuple):
    """What automata over tokens need of a tokenizer.

    texts: the bytes of each id, None where it writes none. strings: the different byte strings, sorted, one after
    another; offset: where each begins, int64 [strings + 1]; string_of_id: int32 [vocabulary], -1 for ids that no
    grammar can use.
    """

    texts: Sequence[bytes | None]
    strings: bytes
    offset: np.ndarray
    string_of_id: np.ndarray

    def ids_of(self, text: bytes) -> list[int]:
        """The tokens that are these bytes."""
        at = self._place_of(text)
        is_there = at < len(self.offset) - 1 and self._string(at) == text
        return np.flatnonzero(self.string_of_id == at).tolist() if is_there else []

    def begins_some(self, text: bytes) -> bool:
        """Whether the bytes of some token begin with these."""
        at = self._place_of(text)
        return at < len(self.offset) - 1 and self._string(at).startswith(text)

    def _place_of(self, text: bytes) -> int:
        return bisect_left(range(len(self.offset) - 1), text, key=self._string)

    def _string(self, index: int) -> bytes:
        return self.strings[self.offset[index] : self.offset[index + 1]]


def vocabulary_of(texts: Sequence[bytes | None], special_ids: Sequence[int], size: int) -> Vocabulary:
    """The vocabulary of tokens with these bytes; special tokens are the characters that stand for them in patterns.

    Ordinary tokens with the first byte of such a character are left out, so that nothing can spell one. size: of the
    model's vocabulary, which may have more ids than the tokenizer.
    """
    written = [b"" if text is None or SYMBOL_BYTE in text else text for text in texts[:size]]
    written += [b""] * (size - len(written))
    for token in special_ids:
        written[token] = chr(SYMBOLS + token).encode() if token <= LARGEST_SYMBOL else b""
    ids = sorted((token for token in range(size) if written[token]), key=written.__getitem__)
    strings: list[bytes] = []
    string_of_id = np.full(size, -1, dtype=np.int32)
    for token in ids:
        if not strings or strings[-1] != written[token]:
            strings.append(written[token])
        string_of_id[token] = len(strings) - 1
    offset = np.zeros(len(strings) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in strings], out=offset[1:])
    return Vocabulary(written, b"".join(strings), offset, string_of_id)


@lru_cache(maxsize=4)
def tokenizer_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer. Raises GrammarError for one whose tokens' bytes are not known."""
    try:
        texts = tokenizer.token_bytes()
    except ValueError as error:
        raise GrammarError(str(error)) from error
    return vocabulary_of(texts, [token for token in tokenizer.special_ids if token < size], size)
