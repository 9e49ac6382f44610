"""The examples of a JSONL file: checked once, then read as a stream through a shuffle buffer.

A line is {"messages": [...]}, whose last message is the assistant's, or {"prompt": ..., "response": ...}; both may have
"tools". Of a conversation the last answer is what is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dgemma_ext import arguments
from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.finetune.draws import Purpose, uniforms

_WANTED = '{"messages": [...]} or {"prompt": ..., "response": ...}'
_FIELDS = {"messages", "prompt", "response", "tools"}
_MODEL_ROLES = ("assistant", "model")
# Draws of the shuffle buffer that are made together.
_DRAWS = 1024


@dataclass(frozen=True)
class Line:
    """A line of a file. number: from 1, for people; index: of the example, for draws."""

    number: int
    index: int
    text: bytes


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt, as generation begins it, and of an answer with the end of its turn. `truncated`: the
    answer was cut to the longest length, and has no end. `response` is the answer's text."""

    index: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    truncated: bool
    response: str


class Examples:
    """The examples of a file. Every line is checked here (0.5 ms each); tokens are made when an example is drawn.

    end: the token that ends an answer. `count` examples; `length`, positions of the longest; `digest` of the content.
    Raises ValueError naming file, line and what is wrong with it.
    """

    def __init__(self, file: Path, tokenizer: Tokenizer, end: int, max_length: int) -> None:
        self.file = file
        self._tokenizer, self._end, self._max_length = tokenizer, end, max_length
        self.count = self.length = 0
        digest = hashlib.sha256()
        for line in self._lines():
            # Whole, so that a run does not end hours later at a line that the template or the length refuses.
            example = self.example(line)
            self.count += 1
            self.length = max(self.length, len(example.prompt) + len(example.answer))
            digest.update(line.text)
        self.digest = digest.hexdigest()
        if self.count == 0:
            raise ValueError(f"{file} has no example; wanted: a line {_WANTED} for each")

    def epoch(self, seed: int, epoch: int, buffer: int) -> Iterator[Line]:
        """The lines of one reading of the file, each once: the next one is drawn among `buffer` lines, whose place the
        line after them in the file takes."""
        drawn, held = 0, list[Line]()
        places = torch.empty(0, dtype=torch.float64, device="cpu")

        def next_place(count: int) -> int:
            nonlocal drawn, places
            if drawn % _DRAWS == 0:
                block = torch.tensor([drawn // _DRAWS], device="cpu")
                places = uniforms(seed, block, epoch, _DRAWS, Purpose.SHUFFLE)[0]
            drawn += 1
            return int(places[(drawn - 1) % _DRAWS] * count)

        for line in self._lines():
            if len(held) < buffer:
                held.append(line)
                continue
            place = next_place(buffer)
            yield held[place]
            held[place] = line
        while held:
            place = next_place(len(held))
            held[place], held[-1] = held[-1], held[place]
            yield held.pop()

    def first(self, count: int) -> list[Example]:
        """The first examples of the file, in order."""
        found: list[Example] = []
        for line in self._lines():
            if len(found) == count:
                break
            found.append(self.example(line))
        return found

    def example(self, line: Line) -> Example:
        """The tokens of a line. Raises ValueError naming file and line."""
        prompt, response, tools = self._parsed(line)
        try:
            ids = self._tokenizer.encode_prompt(prompt, tools=tools)
            answer = self._tokenizer.encode(response)
        except ValueError as error:
            raise self._error(line, str(error)) from error
        room = self._max_length - len(ids)
        if room < 1:
            raise self._error(line, f"its prompt has {len(ids)} tokens, and max_length is {self._max_length}")
        answer = [*answer, self._end]
        return Example(line.index, tuple(ids), tuple(answer[:room]), len(answer) > room, response)

    def _lines(self) -> Iterator[Line]:
        """Lines that are not blank."""
        index = 0
        try:
            with self.file.open("rb") as opened:
                for number, text in enumerate(opened, start=1):
                    if text.strip():
                        yield Line(number, index, text)
                        index += 1
        except OSError as error:
            raise ValueError(f"{self.file} cannot be read: {error.strerror or error}") from error

    def _error(self, line: Line, message: str) -> ValueError:
        return ValueError(f"{self.file}, line {line.number}: {message}")

    def _parsed(self, line: Line) -> tuple[Any, str, Any]:
        """Prompt, response and tools of a line."""
        try:
            found = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            raise self._error(line, f"no JSON: {error}") from error
        if not isinstance(found, dict):
            raise self._error(line, f"got {arguments.shown(found)}, wanted: {_WANTED}")
        unknown = sorted(found.keys() - _FIELDS)
        if unknown:
            raise self._error(line, f"got the field {unknown[0]!r}, wanted: {_WANTED}")
        if ("messages" in found) == ("prompt" in found or "response" in found):
            raise self._error(line, f"got {', '.join(sorted(found)) or 'no field'}, wanted: {_WANTED}")
        try:
            if "messages" not in found:
                prompt, response = (arguments.text(name, found.get(name)) for name in ("prompt", "response"))
                return prompt, response, found.get("tools")
            return *_conversation(found["messages"]), found.get("tools")
        except ValueError as error:
            raise self._error(line, str(error)) from error


def _conversation(messages: Any) -> tuple[list[Any], str]:
    """The messages before the last answer, and that answer's text."""
    given = arguments.sequence("messages", messages, "a list of mappings with role and content")
    for number, message in enumerate(given):
        if not isinstance(message, dict):
            raise arguments.refusal(f"messages[{number}]", "a mapping with role and content", message)
    if len(given) < 2 or given[-1].get("role") not in _MODEL_ROLES:
        raise ValueError("messages must end with the assistant's answer to what comes before it")
    last = given[-1]
    for name in ("tool_calls", "reasoning_content", "thinking"):
        if last.get(name):
            raise ValueError(f"messages[{len(given) - 1}] has {name}; only text is trained")
    content = last.get("content")
    if arguments.is_sequence(content) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text")
    response = arguments.text(f"messages[{len(given) - 1}]['content']", content)
    for number, message in enumerate(given[:-1]):
        parts = message.get("content")
        for part in parts if arguments.is_sequence(parts) else ():
            kind = part.get("type") if isinstance(part, dict) else "text"
            if kind not in ("text", "input_text", "output_text"):
                raise ValueError(f"messages[{number}] has a part of type {kind!r}; only text is trained")
    return given[:-1], response
