"""Checks a chat's messages and tools, and writes them in the one form that chat templates expect.

Taken are the forms of OpenAI's interfaces and of transformers: content as a string, as None in an assistant's turn, or
as a list of parts, texts and images (image_parts.py); tool calls with arguments as a mapping or as JSON text; tools as
schemas with or without the "function" level. Fields with the value None are left out, because templates would print
them or loop over them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dgemma_ext import arguments
from dgemma_ext.checkpoint.image_parts import IMAGE_TYPES, image_source

Message = Mapping[str, Any]

_ROLES = ("system", "developer", "user", "assistant", "model", "tool")
_MODEL_ROLES = ("assistant", "model")
_MESSAGES = "a list of mappings with role and content"
_TEXT_TYPES = ("text", "input_text", "output_text")


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as plain dictionaries. Raises ValueError naming the message and what is wrong with it.

    A part that is an image is {"type": "image"} afterwards; `images_of` has the images.
    """
    given = arguments.sequence("messages", messages, _MESSAGES)
    if not given:
        raise arguments.refusal("messages", _MESSAGES, messages)
    checked: list[dict[str, Any]] = []
    open_calls: list[dict[str, Any]] = []  # of the last assistant's turn, without those that have their result
    for index, message in enumerate(given):
        name = f"messages[{index}]"
        made = _checked_message(name, message)
        if made["role"] == "tool":
            _match_result(name, made, open_calls)
        elif open_calls:
            call = open_calls[0]["function"]["name"]
            raise arguments.refusal(f"{name}['role']", f"tool, with the result of the call of {call}", made["role"])
        else:
            # Turns that bring results themselves follow another convention, which the template checks.
            open_calls = [] if made.get("tool_responses") else list(made.get("tool_calls", ()))
        checked.append(made)
    return checked


def images_of(messages: Sequence[Message]) -> list[tuple[str, str, Any]]:
    """The images of messages in their order: what errors call each, the key that holds it, and the image as given.

    Raises ValueError as `checked_messages` does for an image's part.
    """
    found = []
    for index, message in enumerate(arguments.sequence("messages", messages, _MESSAGES)):
        plain = _plain(message)
        content = plain.get("content") if isinstance(plain, Mapping) else None
        parts: Sequence[Any] = content if content is not None and arguments.is_sequence(content) else ()
        for place, part in enumerate(parts):
            name = f"messages[{index}]['content'][{place}]"
            if isinstance(part, Mapping) and part.get("type") in IMAGE_TYPES:
                found.append((name, *image_source(name, part)))
    return found


def checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools as {"type": "function", "function": schema}; None for no tools. Raises ValueError naming the tool."""
    if tools is None:
        return None
    checked = []
    for index, tool in enumerate(arguments.sequence("tools", tools, "a list of JSON schemas of functions")):
        name = f"tools[{index}]"
        if not isinstance(tool, Mapping):
            how = " (transformers.utils.get_json_schema makes one of a Python function)" if callable(tool) else ""
            raise arguments.refusal(name, f"the JSON schema of a function{how}", tool)
        arguments.choice(f"{name}['type']", tool.get("type", "function"), ["function"])
        function = tool.get("function", {key: value for key, value in tool.items() if key != "type"})
        checked.append({"type": "function", "function": _checked_function(f"{name}['function']", function)})
    return checked or None


def _checked_message(name: str, message: Any) -> dict[str, Any]:
    message = _plain(message)
    if not isinstance(message, Mapping):
        raise arguments.refusal(name, "a mapping with role and content", message)
    arguments.choice(f"{name}['role']", message.get("role"), _ROLES)
    made = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in made:
        if made["role"] not in _MODEL_ROLES:
            raise arguments.refusal(f"{name}['role']", "assistant where there are tool_calls", made["role"])
        made["tool_calls"] = _checked_calls(f"{name}['tool_calls']", made["tool_calls"])
    made["content"] = _checked_content(f"{name}['content']", made.get("content"), made["role"])
    return made


def _plain(message: Any) -> Any:
    """The objects that OpenAI's package returns as mappings, and anything else as it is."""
    return message.model_dump() if hasattr(message, "model_dump") else message


def _checked_content(name: str, content: Any, role: str) -> Any:
    if content is None and role in _MODEL_ROLES:
        return ""
    if isinstance(content, str):
        return arguments.text(name, content)
    if role == "tool" and isinstance(content, Mapping):
        return dict(content)
    parts = arguments.sequence(name, content, "a string or a list of parts, texts and images")
    return [_checked_part(f"{name}[{index}]", part) for index, part in enumerate(parts)]


def _checked_part(name: str, part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": arguments.text(name, part)}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "refusal":
        kind, part = "text", {"text": part.get("refusal")}
    if kind in IMAGE_TYPES:
        image_source(name, part)
        return {"type": "image"}
    if kind not in _TEXT_TYPES:
        wanted = 'text, {"type": "text", "text": ...} or an image (audio and video are not supported)'
        raise arguments.refusal(name, wanted, part)
    return {"type": "text", "text": arguments.text(f"{name}['text']", part.get("text"))}


def _checked_calls(name: str, calls: Any) -> list[dict[str, Any]]:
    entries = arguments.sequence(name, calls, "a list of tool calls")
    return [_checked_call(f"{name}[{index}]", call) for index, call in enumerate(entries)]


def _checked_call(name: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise arguments.refusal(name, '{"function": {"name": ..., "arguments": ...}}', call)
    given = function.get("arguments")
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: arguments must be JSON, got {arguments.shown(given)}: {error}") from error
    if not isinstance(given, Mapping | None):
        raise arguments.refusal(f"{name}: arguments", "a mapping, or one as JSON", given)
    made = {"type": "function", "function": {"name": function["name"], "arguments": dict(given or {})}}
    return made if call.get("id") is None else {"id": call["id"], **made}


def _match_result(name: str, result: dict[str, Any], open_calls: list[dict[str, Any]]) -> None:
    """Gives a result the id and the name of its call, and takes that off `open_calls`.

    The call is that of the same id; without one, the first of the same name; without either, the first.
    """
    key = next((key for key in ("tool_call_id", "name") if key in result), None)
    matches = [
        call
        for call in open_calls
        if key is None or result[key] == {"tool_call_id": call.get("id"), "name": call["function"]["name"]}[key]
    ]
    if not matches:
        named = "" if key is None else f" of {key} {result[key]!r}"
        raise ValueError(f"{name} must have a tool call before it{named} that has no result yet")
    call = matches[0]
    open_calls.remove(call)
    result["name"] = call["function"]["name"]
    if "id" in call:
        result["tool_call_id"] = call["id"]


def _checked_function(name: str, function: Any) -> dict[str, Any]:
    if not isinstance(function, Mapping):
        raise arguments.refusal(name, "a mapping with name, description and parameters", function)
    made = {key: value for key, value in function.items() if value is not None}
    if not isinstance(made.get("name"), str) or not made["name"].strip() or "{" in made["name"]:
        raise arguments.refusal(f"{name}['name']", "a name without braces", made.get("name"))
    arguments.text(f"{name}['description']", made.get("description", ""))
    if not isinstance(made.get("parameters", {}), Mapping):
        raise arguments.refusal(f"{name}['parameters']", "a JSON schema", made["parameters"])
    return made
