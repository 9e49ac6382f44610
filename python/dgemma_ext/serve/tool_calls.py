"""Tool calls as OpenAI's interfaces spell them."""

from __future__ import annotations

import json
from typing import Any

from dgemma_ext.checkpoint import ToolCall


def call_id(reply_id: str, choice: int, number: int) -> str:
    """The id of a call, by which its result comes back: unique, and the same streamed or not."""
    return f"call_{reply_id.rpartition('-')[2]}_{choice}_{number}"


def tool_call(id: str, call: ToolCall) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": call.name, "arguments": arguments_of(call)}}


def arguments_of(call: ToolCall) -> str:
    """A call's arguments as JSON text."""
    return json.dumps(call.arguments, ensure_ascii=False)
