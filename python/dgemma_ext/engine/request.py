"""A request: its prompt and settings, its answer so far, and the scheduler's state of it between steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

from torch import Tensor

from dgemma_ext.checkpoint import Response, Tokenizer
from dgemma_ext.engine.matching import Matching
from dgemma_ext.engine.output import Output
from dgemma_ext.engine.prompt import TokenizedPrompt
from dgemma_ext.engine.tokens import ContextTokens
from dgemma_ext.errors import GrammarError
from dgemma_ext.model import LoadedAdapter
from dgemma_ext.sampling import Alternatives, Canvas, Constraint, Grammar, ResolvedSampler, TokenLogprobs


class RequestState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Request:
    """One prompt and its answer. Made by `Scheduler.submit`."""

    def __init__(
        self,
        number: int,
        prompt: TokenizedPrompt,
        vocab_size: int,
        max_new_tokens: int,
        sampler: ResolvedSampler,
        seed: int,
        canvas: Canvas | None,
        tokenizer: Tokenizer | None,
        cancel: Callable[[Request], bool],
        alternatives: Alternatives | None = None,
        is_late: Callable[[], bool] | None = None,
        matching: Matching | None = None,
        adapter: LoadedAdapter | None = None,
    ) -> None:
        self.number = number
        self.prompt_ids = prompt.ids
        self.max_new_tokens = max_new_tokens
        self.sampler = sampler
        self.seed = seed
        self.canvas = canvas
        self.adapter = None if adapter is None else adapter.name
        self.alternatives = alternatives  # of each token's log-probabilities; None for none
        self.logprobs: list[TokenLogprobs] | None = None if alternatives is None else []
        self.choices: dict[str, float] | None = None  # the scores of a dg.Choice's texts
        self.cached_tokens = 0  # tokens of the prompt that came from the prefix cache
        self.state = RequestState.WAITING
        self.error: Exception | None = None
        self.token_ids: list[int] = []
        self.denoising_steps: list[int] = []
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        # Weak, so that a scheduler with unfinished requests, and its network, can be dropped at once.
        self._cancel: Callable[[], Callable[[Request], bool] | None] = weakref.WeakMethod(cancel)
        self._emitted = Response()
        certain = None if canvas is None else canvas.certain_length(sampler.eos_token_ids)
        self._longest = max_new_tokens if certain is None else min(max_new_tokens, certain)
        # The scheduler's state.
        self._slot = -1  # in the cache
        self._tokens = ContextTokens(prompt, vocab_size)
        self._length = sampler.canvas_length  # of the current canvas
        self._in_canvas = False
        self._is_late = is_late  # None without a deadline
        self._matching = matching
        self._adapter = adapter

    def __getstate__(self) -> dict[str, Any]:
        """A copy, by copy.deepcopy or pickle, is a record: it belongs to no scheduler."""
        return {**vars(self), "_cancel": _no_scheduler, "_is_late": None, "_adapter": None}

    @property
    def grammar(self) -> Grammar | None:
        return None if self._matching is None else self._matching.grammar

    @property
    def prefix_key(self) -> str | None:
        """What the keys and values of its prefix depend on beside the ids."""
        return None if self._adapter is None else self._adapter.digest

    @property
    def done(self) -> bool:
        return self.state not in (RequestState.WAITING, RequestState.RUNNING)

    @property
    def canvas_lengths(self) -> set[int]:
        """The lengths of the canvases that the answer may have."""
        canvases = canvases_of(self._longest, self.sampler.canvas_length)
        return {self.sampler.length_of(index, self._longest) for index in range(canvases)}

    @property
    def positions(self) -> tuple[int, int]:
        """The positions that the cache holds of it, and with the last canvas."""
        length = self.sampler.canvas_length
        cached = cached_positions(len(self.prompt_ids), self._longest, length)
        return cached, cached + self.sampler.length_of(canvases_of(self._longest, length) - 1, self._longest)

    @property
    def output(self) -> Output:
        """The answer. Raises the request's error where it failed, RuntimeError where there is no answer (yet)."""
        if self.error is not None:
            raise self.error
        if self.finish_reason is None:
            raise RuntimeError(f"request {self.number} is {self.state.value} and has no output")
        response = self.response
        return Output(
            text=response.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            denoising_steps=tuple(self.denoising_steps),
            thinking=response.thinking,
            tool_calls=response.tool_calls,
            invalid_tool_calls=response.invalid_tool_calls,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            cached_tokens=self.cached_tokens,
            parsed=self._parsed(response),
            choices=self.choices,
        )

    def constraint(self, length: int) -> Constraint | None:
        """What holds the next canvas, of `length` positions, to the grammar."""
        return None if self._matching is None else self._matching.constraint(len(self.token_ids), length)

    @property
    def is_cut(self) -> bool:
        """Whether the length limit has ended an answer that the model might have gone on with.

        With a grammar of JSON, a choice or calls an answer is whole wherever it may end.
        """
        if self.finish_reason != "length" or self._matching is None:
            return self.finish_reason == "length"
        return self._matching.goes_on and self._matching.grammar.is_open(self.response)

    def choice_scores(self, logits: Tensor, softcap: float, draft: list[int]) -> dict[str, float] | None:
        """The scores of a dg.Choice's texts after a canvas with this draft; logits: raw, [L, vocabulary]."""
        if self._matching is None or self._tokenizer is None:
            return None
        return self._matching.choice_scores(self._tokenizer, self.token_ids, draft, logits, softcap)

    def follow(self, draft: Sequence[int]) -> None:
        """Walks a finished canvas through the grammar once more. Raises GrammarError where it does not match."""
        if self._matching is not None and not self._matching.follow(draft):
            raise GrammarError(f"canvas {len(self.denoising_steps) - 1} of request {self.number} does not match it")

    def _parsed(self, response: Response) -> Any:
        """The value of a whole answer; one that was cut off by its deadline has none."""
        if self.grammar is None or self.finish_reason == "deadline":
            return None
        return self.grammar.parse(response)

    @property
    def response(self) -> Response:
        """The answer so far, taken apart; empty for a checkpoint without a tokenizer."""
        return self._parse(self.token_ids)

    @property
    def settled_response(self) -> Response:
        """The answer so far without what the next canvas may change at its end; of an ended one, all."""
        return self._parse(self.token_ids, is_whole=self.finish_reason is not None)

    def cancel(self) -> bool:
        """Stops the request and frees its slot. Returns False for a request that has ended already."""
        cancel = self._cancel()
        if cancel is not None:
            return cancel(self)
        if self.done:
            return False
        self.state = RequestState.CANCELLED  # its scheduler was dropped
        return True

    def keep(self, draft: Sequence[int], out_of_time: bool) -> list[int]:
        """Adds to the answer what it keeps of a finished canvas, and returns that; sets finish_reason where it ends.

        out_of_time: whether the canvas was taken before it had finished.
        """
        room = self.max_new_tokens - len(self.token_ids)
        kept = self._until_end(draft[:room])
        if out_of_time:
            self.finish_reason = "deadline"
        elif kept[-1] in self.sampler.eos_token_ids:
            self.finish_reason = "eos"
        elif len(draft) >= room:
            self.finish_reason = "length"
        elif self._is_late is not None and self._is_late():
            self.finish_reason = "deadline"
        self.token_ids += kept
        return kept

    def new_words(self) -> tuple[str, str]:
        """The text and the thoughts that the answer has gained since the last call."""
        before, self._emitted = self._emitted, self.settled_response
        return _gained(before, self._emitted)

    def kept_of_draft(self, canvas_index: int, ids: Sequence[int]) -> list[int]:
        """The ids that the answer would keep of a draft of a canvas."""
        return self._until_end(ids[: self.max_new_tokens - canvas_index * self.sampler.canvas_length])

    def words_of_draft(self, canvas_index: int, ids: Sequence[int]) -> tuple[str, str]:
        """The text and the thoughts that a draft of a canvas would add to the canvases before it."""
        before = self.token_ids[: canvas_index * self.sampler.canvas_length]  # the last canvas alone may be shorter
        kept = self.kept_of_draft(canvas_index, ids)
        return _gained(self._parse(before, is_whole=False), self._parse(before + kept))

    def _until_end(self, ids: Sequence[int]) -> list[int]:
        """The ids up to and including the first end of text."""
        end = next((i + 1 for i, token in enumerate(ids) if token in self.sampler.eos_token_ids), len(ids))
        return list(ids[:end])

    def _parse(self, ids: Sequence[int], is_whole: bool = True) -> Response:
        """An answer that begins with ids. While it is not whole, what may change with the next canvas is held back:
        bytes at its end may be those of a character that is not whole yet."""
        if self._tokenizer is None:
            return Response()
        if is_whole:
            return self._tokenizer.parse_response(ids, prefix=self.prompt_ids)
        response = self._tokenizer.parse_response(self._tokenizer.settled(ids), prefix=self.prompt_ids)
        return replace(response, text=response.text.rstrip("\ufffd"), thinking=response.thinking.rstrip("\ufffd"))


def _gained(before: Response, after: Response) -> tuple[str, str]:
    return after.text[len(before.text) :], after.thinking[len(before.thinking) :]


def _no_scheduler() -> None:
    """In place of the weak reference to a scheduler's method."""


def canvases_of(max_new_tokens: int, canvas_length: int) -> int:
    """How many canvases an answer may have."""
    return -(-max_new_tokens // canvas_length)


def cached_positions(prompt_length: int, max_new_tokens: int, canvas_length: int) -> int:
    """The positions that the cache holds: the prompt and every canvas but the last, which is never encoded."""
    return prompt_length + (canvases_of(max_new_tokens, canvas_length) - 1) * canvas_length
