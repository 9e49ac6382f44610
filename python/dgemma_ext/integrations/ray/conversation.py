"""Which conversation a request belongs to, told from its header and its body."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

HEADER = "x-session-id"

# What is told of a prompt that is no conversation: so many characters, or token ids, of its beginning.
_BEGINNING = 512


def session_of(header: str | None, body: bytes) -> str:
    """A name of the conversation, or "" where the request tells none.

    The header x-session-id says it, or the body's `prompt_cache_key`; else it is a hash of what stays the same from one
    turn to the next: everything up to the first message of the user, and `user`. Of a prompt it is the beginning.
    """
    if header:
        return header
    try:
        asked = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return ""  # the replica says what is wrong with it
    if not isinstance(asked, dict):
        return ""
    if isinstance(asked.get("prompt_cache_key"), str) and asked["prompt_cache_key"]:
        return _hash("key", asked["prompt_cache_key"])
    for name in ("messages", "input", "prompt"):
        if asked.get(name):
            return _hash(asked.get("user"), asked.get("instructions"), _beginning(asked[name]))
    return ""


def _beginning(prompt: Any) -> Any:
    if isinstance(prompt, list):
        for place, message in enumerate(prompt):
            if isinstance(message, Mapping) and message.get("role") == "user":
                return prompt[: place + 1]
        return prompt[:_BEGINNING] if isinstance(prompt[0], int) else prompt[:1]
    return prompt[:_BEGINNING] if isinstance(prompt, str) else prompt


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
