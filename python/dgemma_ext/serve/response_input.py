"""From the items of /v1/responses to the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dgemma_ext.serve import errors
from dgemma_ext.serve.protocol.responses import ResponsesRequest


def messages_of(items: str | Sequence[Mapping[str, Any]], instructions: str | None = None) -> list[dict[str, Any]]:
    """The messages of a request's input. Raises ApiError naming the item."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for index, item in enumerate(items):
        _add(messages, item, f"input[{index}]")
    return messages


def tools_of(body: ResponsesRequest) -> list[dict[str, Any]] | None:
    """The tools of a request. Raises ApiError for OpenAI's own tools."""
    for index, tool in enumerate(body.tools or []):
        if tool.get("type") != "function":
            raise errors.not_supported(f"tools[{index}].type", f"tools[{index}].type must be function here")
    return body.tools


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any], name: str) -> None:
    """Adds an item: thoughts and calls join the assistant's turn that they belong to."""
    kind = item.get("type", "message")
    if kind == "message":
        turn = {"role": item.get("role"), "content": item.get("content")}
        last = messages[-1] if messages else {}
        if turn["role"] == "assistant" and last.get("role") == "assistant" and not last["content"]:
            last["content"] = turn["content"]
        else:
            messages.append(turn)
    elif kind == "function_call":
        call = {
            "id": item.get("call_id"),
            "function": {"name": item.get("name"), "arguments": item.get("arguments")},
        }
        _assistant_turn(messages).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = item.get("output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind == "reasoning":
        parts = item.get("content") or []
        thoughts = "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
        if thoughts:
            messages.append({"role": "assistant", "content": "", "reasoning_content": thoughts})
    else:
        raise errors.bad_request(f"{name}.type {kind!a:.60} is not supported here", f"{name}.type")


def _assistant_turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's turn at the end, which is begun where there is none."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]
