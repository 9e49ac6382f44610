"""Eleven JSON schemas from small to as large as the limits allow, and a vocabulary of 262,144 tokens made by rule.

The vocabulary has the shapes of a published one (single bytes, words with and without a space before them, numbers,
runs of punctuation and of white space, other scripts) and nobody's words.
"""

from __future__ import annotations

import random
from typing import Any

VOCABULARY_SIZE = 262_144
PAD, END = 0, 1

_CONSONANTS = [
    "",
    "b",
    "br",
    "c",
    "ch",
    "d",
    "f",
    "g",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "th",
    "v",
    "w",
]
_VOWELS = ["a", "e", "i", "o", "u", "ea", "ou", "y"]
_CODAS = ["", "", "n", "r", "s", "t", "l", "ng", "ck", "ed"]
_SCRIPTS = [(0xE0, 0xFC), (0x430, 0x44F), (0x4E00, 0x4FFF), (0x905, 0x939), (0xAC00, 0xACFF), (0x1F600, 0x1F640)]
_MARKS = list("{}[]()<>:;,.!?\"'`/\\|-_=+*&^%$#@~")


def _word(rng: random.Random) -> str:
    count = rng.choices([1, 2, 3, 4], [2, 5, 4, 1])[0]
    parts = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))
    word = "".join(parts)
    return word.capitalize() if rng.random() < 0.15 else word


def _piece(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.80:
        text = _word(rng)
    elif kind < 0.92:
        text = "".join(chr(rng.randint(*rng.choice(_SCRIPTS))) for _ in range(rng.randint(1, 4)))
    elif kind < 0.97:
        text = "".join(rng.choices(_MARKS, k=rng.randint(2, 4)))
    else:
        text = rng.choice(["\n", "\t", "\n ", "  ", '",\n', '": ', "},\n"]) * rng.randint(1, 16)
    return " " + text if rng.random() < 0.45 else text


def make_texts(size: int = VOCABULARY_SIZE, seed: int = 0) -> list[bytes | None]:
    """The bytes of each id: None for the first two (padding, end), then all single bytes, then different pieces."""
    rng, texts = random.Random(seed), [None, None, *(bytes([byte]) for byte in range(256))]
    known = set(texts)
    while len(texts) < size:
        text = _piece(rng).encode()
        if text not in known:
            known.add(text)
            texts.append(text)
    return texts


def _object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


_TEXT, _COUNT, _FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_NODE = _object(value=_COUNT, children={"type": "array", "items": {"$ref": "#/$defs/node"}})
_KINDS = [_TEXT, _COUNT, _FLAG, {"type": "number"}]


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    return _object(tool={"const": name}, arguments=_object(**arguments))


SCHEMAS: dict[str, Any] = {
    "three fields": _object(name=_TEXT, age=_COUNT, active=_FLAG),
    "a string of at most 200": _object(
        category={"enum": ["none", "spam", "abuse", "other"]},
        severity={"enum": [1, 2, 3]},
        certain=_FLAG,
        reason={"type": "string", "maxLength": 200},
    ),
    "invoice": _object(
        id={"type": "string", "pattern": "^INV-[0-9]{6}$"},
        date={"type": "string", "format": "date"},
        total={"type": "number"},
        customer=_object(name=_TEXT, email={"type": "string", "format": "email"}, city=_TEXT),
        lines={"type": "array", "items": _object(article=_TEXT, count=_COUNT, price={"type": "number"}), "minItems": 1},
    ),
    "one of three tool calls": {
        "anyOf": [
            _call("weather", city=_TEXT, days=_COUNT),
            _call("search", query=_TEXT),
            _call("mail", to={"type": "string", "format": "email"}, subject=_TEXT, urgent=_FLAG),
        ]
    },
    "six optional fields": _object(
        ["title"], title=_TEXT, summary=_TEXT, author=_TEXT, year=_COUNT, link=_TEXT, free=_FLAG
    ),
    "uuid and two times": _object(
        id={"type": "string", "format": "uuid"},
        begin={"type": "string", "format": "date-time"},
        end={"type": "string", "format": "date-time"},
    ),
    "bounded numbers": _object(
        score={"type": "integer", "minimum": -20, "maximum": 105},
        ratio={"type": "number", "minimum": 0, "maximum": 1},
    ),
    "recursive, depth 3": {"$defs": {"node": _NODE}, "$ref": "#/$defs/node"},
    "any object, depth 3": {"type": "object"},
    "thirty fields": _object(**{f"field_{number}": _KINDS[number % 4] for number in range(30)}),
    "3 to 20 strings of at most 40": _object(
        words={"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 3, "maxItems": 20}
    ),
}
