"""A conversation: turns through the chat template, with the cache carried from turn to turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from dgemma_ext import arguments
from dgemma_ext.checkpoint import InvalidToolCall, Message, ToolCall
from dgemma_ext.engine.events import Commit, Draft, Failure
from dgemma_ext.engine.memory import USUAL_CONTEXT
from dgemma_ext.engine.output import Output
from dgemma_ext.engine.prefix_cache import USUAL_SNAPSHOTS
from dgemma_ext.engine.prompt import PromptOptions, with_images, with_images_read
from dgemma_ext.engine.request import Request
from dgemma_ext.engine.scheduler import Scheduler
from dgemma_ext.engine.served import ServedModel
from dgemma_ext.model import Cache
from dgemma_ext.sampling import Grammar, SamplerConfig

_TURN = "text, or messages with role and content"


class Chat:
    """Keeps the messages, and encodes only the part of each turn's prompt that is in no snapshot of earlier turns.

    A sliding layer's ring cannot be rewound and the template rewrites history (it drops the thoughts of earlier
    turns), so a turn continues from the longest snapshot that is a prefix of the new prompt, not from the end of the
    last answer.

    Attributes: `messages`, the conversation so far; `output`, the last answer, None before the first; `options`, the
    tools and template variables of the turns to come; `adapter`, the name of theirs. `text`,
    `thinking`, `tool_calls`, `invalid_tool_calls` and `token_ids` are those of the last answer.

    A conversation is one thread's at a time: a turn during another thread's raises RuntimeError.
    """

    def __init__(
        self,
        model: ServedModel,
        system: str | None = None,
        max_length: int | None = None,
        options: PromptOptions | None = None,
        adapter: str | None = None,
    ) -> None:
        if model.tokenizer is None:
            raise ValueError("a chat needs a checkpoint with tokenizer.json")
        if system is not None:
            arguments.text("system", system)
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.output: Output | None = None
        self.options = options or PromptOptions()
        model.network.adapters.named(adapter)  # refuses a name that is none
        self.adapter = adapter
        self._lock = threading.Lock()
        self._speaker: int | None = None  # the thread whose turn is under way
        network = model.network
        context = min(USUAL_CONTEXT, network.config.max_position_embeddings) if max_length is None else max_length
        slot = Cache(network.config, 1, context, network.dtype, torch.device("meta"))
        budget = USUAL_SNAPSHOTS * slot.nbytes
        self._scheduler = Scheduler(model, max_batch=1, max_length=max_length, prefix_cache_bytes=budget)

    @property
    def text(self) -> str:
        return "" if self.output is None else self.output.text

    @property
    def thinking(self) -> str:
        return "" if self.output is None else self.output.thinking

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return () if self.output is None else self.output.tool_calls

    @property
    def invalid_tool_calls(self) -> tuple[InvalidToolCall, ...]:
        return () if self.output is None else self.output.invalid_tool_calls

    @property
    def token_ids(self) -> tuple[int, ...]:
        return () if self.output is None else self.output.token_ids

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Chat holds a cache and cannot be copied or pickled; its `messages` can")

    def send(
        self,
        turn: str | Message | Sequence[Message],
        max_new_tokens: int | None = None,
        sampler: SamplerConfig | None = None,
        seed: int = 0,
        grammar: Grammar | None = None,
        images: Sequence[Any] | None = None,
    ) -> str:
        """Adds a turn and returns the text of the model's answer.

        turn: the user's text, or one or more messages. After an answer that calls tools these are the results, one
        message of the role tool for each call, in the order of the calls or with their "tool_call_id" or "name".
        images: of a turn that is text, put before it; `messages` keeps them as they were read.
        """
        for _ in self.stream(turn, max_new_tokens, sampler, seed, grammar, images):
            pass
        return self.text

    def stream(
        self,
        turn: str | Message | Sequence[Message],
        max_new_tokens: int | None = None,
        sampler: SamplerConfig | None = None,
        seed: int = 0,
        grammar: Grammar | None = None,
        images: Sequence[Any] | None = None,
    ) -> Iterator[Draft | Commit]:
        """`send` as a stream of events. A turn that is left early, or fails, does not become part of the chat."""
        options = self.options
        given = _messages_of(turn if images is None else with_images("turn", turn, images))
        turns = with_images_read(given, self._scheduler, options.image_tokens)
        with self._speaking():
            request = self._scheduler.submit(
                [*self.messages, *turns],
                max_new_tokens,
                sampler,
                seed,
                tools=options.tools,
                enable_thinking=options.enable_thinking,
                chat_template_kwargs=options.chat_template_kwargs,
                special_tokens=options.special_tokens,
                image_tokens=options.image_tokens,
                grammar=grammar,
                adapter=self.adapter,
            )
            try:
                yield from self._events(request)
            finally:
                request.cancel()
            self.output = request.output
            self.messages += [*turns, self.output.message]

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        speaker = threading.get_ident()
        with self._lock:
            if self._speaker not in (None, speaker):
                raise RuntimeError("a turn of this chat is under way in another thread")
            self._speaker = speaker
        try:
            yield
        finally:
            self._speaker = None

    def _events(self, request: Request) -> Iterator[Draft | Commit]:
        while not request.done:
            for event in self._scheduler.step():
                if event.request is not request:
                    continue  # of a turn that was left early
                if isinstance(event, Failure):
                    raise event.error
                yield event


def _messages_of(turn: str | Message | Sequence[Message]) -> list[Any]:
    if isinstance(turn, str):
        return [{"role": "user", "content": turn}]
    if isinstance(turn, Mapping):
        return [turn]
    messages = arguments.sequence("turn", turn, _TURN)
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise arguments.refusal("turn", _TURN, turn)
    return messages
