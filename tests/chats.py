"""Texts, tools and answers for tests of prompts and chats.

A random model says nothing that can be read, so answers are pinned into its canvases.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st

import dgemma_ext as dg
from tokenizer_files import SPECIAL_TOKENS

Noted = TypeVar("Noted")

LOOK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    },
}


def texts() -> st.SearchStrategy[str]:
    """Any text, with special tokens and pieces of them."""
    spelled = st.sampled_from([*SPECIAL_TOKENS, "<", "|", ">", "<|", "|>", "turn", '"', "<0x41>", " ", "\n"])
    return st.lists(spelled | st.text(max_size=8), max_size=8).map("".join)


def json_values() -> st.SearchStrategy[Any]:
    """What the arguments of a call may hold. A bare key ends with a colon, and ▁ is a space to the tokenizer."""
    strings = texts().map(lambda text: text.replace("▁", " "))
    keys = strings.map(lambda text: text.replace(":", "").replace("\0", "").strip().lstrip("}\"'").strip()).filter(len)
    numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    return st.recursive(
        st.none() | st.booleans() | numbers | strings,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=12,
    )


def json_objects() -> st.SearchStrategy[dict[str, Any]]:
    return json_values().map(lambda value: value if isinstance(value, dict) else {"value": value})


def pinned(ids: list[int]) -> dg.Canvas:
    """A canvas that makes these ids the beginning of the answer."""
    return dg.Canvas(tokens=ids, pinned=[True] * len(ids))


def prompts_of(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts of the requests to come."""
    return noted(monkeypatch, lambda request: request.prompt_ids)


def noted(monkeypatch: pytest.MonkeyPatch, part: Callable[[dg.Request], Noted]) -> list[Noted]:
    """A part of each request to come."""
    seen: list[Noted] = []
    original = dg.Scheduler.submit

    def spy(self: dg.Scheduler, *arguments: Any, **named: Any) -> dg.Request:
        request = original(self, *arguments, **named)
        seen.append(part(request))
        return request

    monkeypatch.setattr(dg.Scheduler, "submit", spy)
    return seen


def answering(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[list[int]]:
    """Pins the answers of the requests to come, written with their markers; returns their prompts, as they come."""
    waiting = list(answers)
    original = dg.Scheduler.submit

    def pinning(self: dg.Scheduler, *arguments: Any, **named: Any) -> dg.Request:
        assert self.tokenizer is not None
        bound = inspect.signature(original).bind(self, *arguments, **named)
        bound.arguments["canvas"] = pinned(self.tokenizer.encode(waiting[0], special_tokens="tokens"))
        request = original(*bound.args, **bound.kwargs)
        del waiting[0]
        return request

    monkeypatch.setattr(dg.Scheduler, "submit", pinning)
    return prompts_of(monkeypatch)
