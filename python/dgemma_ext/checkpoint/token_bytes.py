"""The bytes that each token writes, for automata over tokens."""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

_BYTE = re.compile("<0x([0-9A-F]{2})>")


def token_bytes(model: tokenizers.Tokenizer, special_ids: frozenset[int]) -> list[bytes | None]:
    """The bytes of every id, by the rules of the tokenizer's decoder; None for special tokens and for unused ids.

    Raises ValueError for a decoder whose tokens do not write the same bytes wherever they stand, or that is not known.
    """
    file: dict[str, Any] = json.loads(model.to_str())
    rules = _rules(file.get("decoder"))
    found: list[bytes | None] = [None] * model.get_vocab_size(with_added_tokens=True)
    for text, token in model.get_vocab(with_added_tokens=True).items():
        if token in special_ids or token >= len(found):
            continue
        byte = _BYTE.fullmatch(text) if rules.bytes_by_name else None
        if byte is not None:
            found[token] = bytes([int(byte[1], 16)])
        elif rules.letters is not None:
            found[token] = bytes(rules.letters[letter] for letter in text if letter in rules.letters)
        else:
            for pattern, content in rules.replacements:
                text = text.replace(pattern, content)
            found[token] = text.encode()
    return found


class _Rules:
    """replacements: texts that the decoder replaces. bytes_by_name: whether <0x0A> is a byte. letters: the byte of each
    letter, where letters are bytes."""

    def __init__(self) -> None:
        self.replacements: list[tuple[str, str]] = []
        self.bytes_by_name = False
        self.letters: dict[str, int] | None = None


def _rules(decoder: dict[str, Any] | None) -> _Rules:
    rules = _Rules()
    parts = [] if decoder is None else decoder.get("decoders", [decoder])
    for part in parts:
        kind = part["type"]
        if kind == "ByteFallback":
            rules.bytes_by_name = True
        elif kind == "Replace" and "String" in part["pattern"]:
            rules.replacements.append((part["pattern"]["String"], part["content"]))
        elif kind == "ByteLevel":
            rules.letters = _letters_of_bytes()
        elif kind != "Fuse":
            raise ValueError(f"the tokenizer's decoder {kind} is not known, so its tokens' bytes are not either")
    return rules


def _letters_of_bytes() -> dict[str, int]:
    """The letters of bytes in byte-level vocabularies: visible Latin-1 as itself, the others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
