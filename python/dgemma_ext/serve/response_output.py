"""The output of /v1/responses: items that open, grow and close, with an event for each of these.

A whole response is what its events add up to, so streamed or not it is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dgemma_ext.serve.answer import Piece
from dgemma_ext.serve.tool_calls import arguments_of, call_id

Event = dict[str, Any]

# Kind of an item → its prefix of ids, the type of its part, and the name of its events.
_TEXTS = {
    "reasoning": ("rs", "reasoning_text", "response.reasoning_text"),
    "message": ("msg", "output_text", "response.output_text"),
}


class Output:
    """Items so far. `add` and `finish` change them and yield the events that tell so, without sequence numbers."""

    def __init__(self, reply_id: str) -> None:
        self.items: list[dict[str, Any]] = []
        self._reply_id = reply_id
        self._open: str | None = None  # the kind of the last item while it grows
        self._calls = 0

    def add(self, piece: Piece) -> Iterator[Event]:
        if piece.thinking:
            yield from self._grow("reasoning", piece.thinking)
        if piece.text:
            yield from self._grow("message", piece.text)
        for call in piece.calls:
            yield from self._close()
            arguments = arguments_of(call)
            item = {
                "id": self._id("fc"),
                "type": "function_call",
                "status": "in_progress",
                "call_id": call_id(self._reply_id, 0, self._calls),
                "name": call.name,
                "arguments": "",
            }
            self._calls += 1
            yield self._added(item)
            place = self._place
            yield {"type": "response.function_call_arguments.delta", **place, "delta": arguments}
            item["arguments"], item["status"] = arguments, "completed"
            yield {"type": "response.function_call_arguments.done", **place, "arguments": arguments, "name": call.name}
            yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": dict(item)}

    def finish(self, is_cut: bool) -> Iterator[Event]:
        """Closes what is open. An answer without any text has a message without text."""
        if not self.items:
            yield from self._grow("message", "")
        yield from self._close("incomplete" if is_cut else "completed")

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self._reply_id.rpartition('_')[2]}_{len(self.items)}"

    def _added(self, item: dict[str, Any]) -> Event:
        self.items.append(item)
        shown = {**item, "content": []} if "content" in item else dict(item)
        return {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown}

    def _grow(self, kind: str, text: str) -> Iterator[Event]:
        prefix, part_type, name = _TEXTS[kind]
        if self._open != kind:
            yield from self._close()
            item: dict[str, Any] = {"id": self._id(prefix), "type": kind, "status": "in_progress"}
            if kind == "message":
                item["role"] = "assistant"
            else:
                item["summary"] = []
            item["content"] = [_part(part_type)]
            yield self._added(item)
            self._open = kind
            yield {"type": "response.content_part.added", **self._place, "content_index": 0, "part": _part(part_type)}
        self.items[-1]["content"][0]["text"] += text
        if text:
            more: Event = {"logprobs": []} if kind == "message" else {}
            yield {"type": f"{name}.delta", **self._place, "content_index": 0, "delta": text, **more}

    def _close(self, status: str = "completed") -> Iterator[Event]:
        if self._open is None:
            return
        _, _, name = _TEXTS[self._open]
        more: Event = {"logprobs": []} if self._open == "message" else {}
        self._open = None
        item = self.items[-1]
        item["status"] = status
        (part,) = item["content"]
        place = {**self._place, "content_index": 0}
        yield {"type": f"{name}.done", **place, "text": part["text"], **more}
        yield {"type": "response.content_part.done", **place, "part": dict(part)}
        yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": dict(item)}


def _part(kind: str) -> dict[str, Any]:
    return {"type": kind, "text": ""} | ({"annotations": [], "logprobs": []} if kind == "output_text" else {})
