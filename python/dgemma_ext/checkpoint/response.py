"""Takes a model's answer apart: the text for people, the model's thoughts, and the tools that it calls.

Gemma 4 writes thoughts as `<|channel>thought\n...<channel|>` and calls as `<|tool_call>call:NAME{...}<tool_call|>`. The
markers are special tokens, and only those count: text that spells a marker is text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dgemma_ext.checkpoint.tool_call import InvalidToolCall, ToolCall, ToolCallSyntaxError, parse_tool_call

QUOTE = '<|"|>'


class Part(Enum):
    TEXT = "text"
    THOUGHT = "thought"
    TOOL_CALL = "tool call"
    TOOL_RESPONSE = "tool response"


_PAIRS = {
    Part.THOUGHT: ("<|channel>", "<channel|>"),
    Part.TOOL_CALL: ("<|tool_call>", "<tool_call|>"),
    Part.TOOL_RESPONSE: ("<|tool_response>", "<tool_response|>"),
}
THOUGHT_MARKS = _PAIRS[Part.THOUGHT]
MARKERS = frozenset({QUOTE}.union(*_PAIRS.values()))
_THOUGHT = "thought"  # the name of the channel, on a line of its own


@dataclass
class Segment:
    """Token ids between two markers."""

    part: Part
    ids: list[int] = field(default_factory=list)
    is_closed: bool = False


@dataclass(frozen=True)
class Response:
    """An answer, taken apart.

    text: for people; without thoughts, tool calls and special tokens. thinking: the model's thoughts, one after the
    other. tool_calls: in the order of the answer. invalid_tool_calls: those that cannot be read.
    """

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message for the history of a chat; its tool calls have the ids call_0, call_1, ..."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{index}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
                }
                for index, call in enumerate(self.tool_calls)
            ]
        return message


class ResponseParser:
    """Parses answers by the ids of a vocabulary's special tokens.

    decode(ids, skip_special_tokens): the text of ids.
    """

    def __init__(self, special_ids: Mapping[str, int], decode: Callable[[list[int], bool], str]) -> None:
        self._decode = decode
        self._special = frozenset(special_ids.values())
        self._quote = special_ids.get(QUOTE)
        self._opens: dict[int, Part] = {}
        self._closes: dict[Part, int | None] = {}
        for part, (opens, closes) in _PAIRS.items():
            if opens in special_ids:
                self._opens[special_ids[opens]] = part
                self._closes[part] = special_ids.get(closes)

    def split(self, ids: Iterable[int]) -> list[Segment]:
        """The segments of an answer. A marker that opens one closes the one before it, which may lack its own end."""
        segments = [Segment(Part.TEXT)]
        for token in ids:
            current = segments[-1]
            if token in self._opens:
                segments.append(Segment(self._opens[token]))
            elif current.part is not Part.TEXT and token == self._closes[current.part]:
                current.is_closed = True
                segments.append(Segment(Part.TEXT))
            else:
                current.ids.append(token)
        return segments

    def is_text(self, ids: Sequence[int], prefix: Sequence[int] = ()) -> list[bool]:
        """For each id of an answer whether it is part of its text: no special token, and in no thought or call."""
        parts = self.parts(ids, prefix)
        return [part is Part.TEXT and token not in self._special for part, token in zip(parts, ids, strict=True)]

    def parts(self, ids: Sequence[int], prefix: Sequence[int] = ()) -> list[Part]:
        """For each id of an answer the part that it belongs to; the markers of a part belong to it."""
        part, found = Part.TEXT, []
        opening = self.open_part(prefix)[:1]
        for token in (*opening, *ids):
            part = self._opens.get(token, part)
            found.append(part)
            if part is not Part.TEXT and token == self._closes[part]:
                part = Part.TEXT
        return found[len(opening) :]

    def parse(self, ids: Sequence[int], prefix: Sequence[int] = ()) -> Response:
        """Parses an answer that follows the ids `prefix`.

        A prompt may end inside a thought or a call that the template has begun; the answer then goes on with it.
        """
        text = ""
        thoughts: list[str] = []
        calls: list[ToolCall] = []
        invalid: list[InvalidToolCall] = []
        for segment in self.split([*self.open_part(prefix), *ids]):
            if segment.part is Part.TEXT:
                text += self._decode(segment.ids, True)
            elif segment.part is Part.THOUGHT:
                thoughts.append(self._thought(segment.ids))
            elif segment.part is Part.TOOL_CALL:
                call = self._call(segment)
                if isinstance(call, ToolCall):
                    calls.append(call)
                else:
                    invalid.append(call)
        return Response(text, "\n".join(filter(None, thoughts)), tuple(calls), tuple(invalid))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without special tokens and thoughts. A call keeps its string delimiters: it means nothing
        without them."""
        text = ""
        for segment in self.split(ids):
            if segment.part is not Part.THOUGHT:
                runs = [segment.ids] if segment.part is Part.TEXT else self._split_at_quotes(segment.ids)
                text += QUOTE.join(self._decode(run, True) for run in runs)
        return text

    def open_part(self, prefix: Sequence[int]) -> Sequence[int]:
        """The end of `prefix` from the marker of a part that it leaves open."""
        for position in reversed(range(len(prefix))):
            token = prefix[position]
            if token in self._opens:
                return prefix[position:]
            if token in self._special and token != self._quote:
                break
        return ()

    def _thought(self, ids: list[int]) -> str:
        text = self._decode(ids, True)
        channel, line_end, thought = text.partition("\n")
        if channel.strip() == _THOUGHT:
            text = thought
        elif not line_end and _THOUGHT.startswith(channel.strip()):
            return ""  # the name of the channel is not whole yet
        return text.removesuffix("\n")  # the line end before the closing marker

    def _call(self, segment: Segment) -> ToolCall | InvalidToolCall:
        ids = segment.ids
        if not segment.is_closed:  # by its own marker: what ended the answer is not part of the call
            while ids and ids[-1] in self._special and ids[-1] != self._quote:
                ids = ids[:-1]
        try:
            return parse_tool_call([self._decode(run, False) for run in self._split_at_quotes(ids)])
        except ToolCallSyntaxError as error:
            opens, closes = _PAIRS[Part.TOOL_CALL]
            written = opens + self._decode(ids, False) + (closes if segment.is_closed else "")
            return InvalidToolCall(written, str(error) if segment.is_closed else f"it is not closed, and {error}")

    def _split_at_quotes(self, ids: list[int]) -> list[list[int]]:
        runs: list[list[int]] = [[]]
        for token in ids:
            if token == self._quote:
                runs.append([])
            else:
                runs[-1].append(token)
        return runs
