"""JSON schemas of all kinds, small enough that they compile in milliseconds."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from grammar_cases import record

_names = st.sampled_from(["a", "b", "naïve", 'q"'])
_plain = st.sampled_from(
    [
        {"type": "integer", "minimum": -3, "maximum": 40},
        {"type": "number", "exclusiveMinimum": -1, "maximum": 3},
        {"type": "string", "maxLength": 4},
        {"type": "string", "format": "date"},
        {"type": ["null", "boolean"]},
        {"enum": [1, "x", None, [True], {"k": 2}]},
        {"const": "\u2028\\"},
        {"type": "number"},
        {"type": "string"},
    ]
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(_names, inner, min_size=1, max_size=3)
    return properties.flatmap(lambda p: st.lists(st.sampled_from(list(p)), unique=True).map(lambda r: record(r, **p)))


schemas = st.recursive(
    _plain,
    lambda inner: (
        objects(inner)
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})
        | st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + t[2]}
        )
    ),
    max_leaves=5,
)
