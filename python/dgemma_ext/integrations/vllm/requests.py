"""The requests in vLLM's slots: their canvases, contents and grammars."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dgemma_ext.checkpoint import Tokenizer, resolve_checkpoint
from dgemma_ext.engine.matching import Matching, matching_of
from dgemma_ext.integrations.vllm.contents import Contents
from dgemma_ext.integrations.vllm.request_options import Limits, RequestOptions, check, options_of
from dgemma_ext.integrations.vllm.slots import Slots
from dgemma_ext.sampling import Canvas, Constraint, Grammar, ResolvedSampler

_logger = logging.getLogger("vllm.plugins.dgemma")


class Requests:
    """Up to `count` requests. model: the folder or hub id of the tokenizer, which grammars are spelled by."""

    def __init__(self, count: int, limits: Limits, model: str, device: torch.device) -> None:
        self.count, self.limits, self._model = count, limits, model
        self.slots = Slots(count, limits.canvas_length, limits.vocabulary, device)
        self.contents = Contents(count, limits.canvas_length, limits.vocabulary, device)
        self._matchings: dict[int, Matching] = {}

    def place(
        self,
        slot: int,
        request_id: str,
        prompt: Sequence[int],
        answered: Sequence[int],
        extra_args: Mapping[str, Any] | None,
        max_tokens: int,
    ) -> None:
        """Gives a slot to a request. answered: the tokens of the canvases that it has finished, which are some after
        a preemption.

        extra_args are those that admission has let in. What only the prompt shows to be impossible - a grammar without
        a text that goes on with it - is logged, and the answer is an end of text: an error here would end the engine.
        """
        self.clear(slot)
        options = options_of(extra_args)
        sampler = check(options, self.limits, None)
        seed = seed_of(request_id) if options.seed is None else answer_seed(options, request_id)
        content = options.canvas or Canvas()
        if options.grammar is not None:
            try:
                answer = (list(prompt), sampler, max_tokens, options.canvas)
                matching = _matching(options.grammar, self.limits, tokenizer_of(self._model), *answer)
            except ValueError as error:
                _logger.warning("request %s ends without an answer: %s", request_id, error)
                content, sampler = self._end_of_text(), replace(sampler, max_denoising_steps=1)
            else:
                matching.follow(answered)
                self._matchings[slot], content = matching, matching.content
        self.slots.place(slot, sampler, seed, len(answered) // sampler.canvas_length, content)
        self.contents.place(slot, content)

    def _end_of_text(self) -> Canvas:
        """A canvas that is one."""
        ends, length = self.limits.defaults.eos_token_ids, self.limits.canvas_length
        return Canvas([ends[0] if ends else 0] * length, [True] * length)

    def clear(self, slot: int) -> None:
        self.slots.clear(slot)
        self.contents.clear(slot)
        self._matchings.pop(slot, None)

    # Grammars ---------------------------------------------------------------------------------------------------------

    def has_grammar(self, slot: int) -> bool:
        return slot in self._matchings

    def follow(self, slot: int, draft: Sequence[int]) -> None:
        """Walks a finished canvas through its grammar."""
        self._matchings[slot].follow(draft)

    def constraint(self, slot: int, canvas_index: int, width: int) -> Constraint:
        """What holds a canvas to its grammar."""
        return self._matchings[slot].constraint(canvas_index * width, width)


_tokenizers: dict[str, Tokenizer] = {}


def tokenizer_of(model: str) -> Tokenizer:
    """The tokenizer of a model's folder or hub id, read once. Raises CheckpointError where there is none."""
    if model not in _tokenizers:
        _tokenizers[model] = Tokenizer.from_directory(resolve_checkpoint(model))
    return _tokenizers[model]


def matching_without_prompt(
    options: RequestOptions, limits: Limits, sampler: ResolvedSampler, max_tokens: int | None, tokenizer: Tokenizer
) -> None:
    """Raises ValueError for a grammar that cannot be compiled, or that no answer of max_tokens to a prompt that begins
    no thought matches."""
    assert options.grammar is not None
    most = max_tokens if max_tokens is not None else limits.context or limits.canvas_length
    _matching(options.grammar, limits, tokenizer, [], sampler, most, options.canvas)


def _matching(grammar: Grammar, limits: Limits, tokenizer: Tokenizer, *answer: Any) -> Matching:
    return matching_of(grammar, tokenizer, limits.vocabulary, limits.defaults.pad_token_id, *answer)


def answer_seed(options: RequestOptions, request_id: str) -> int:
    """The seed of a request with one. Of n answers that share it each has its own, the numbers from it on; vLLM makes
    each a request, whose id begins with its number."""
    assert options.seed is not None
    number = re.match(r"(\d+)_", request_id) if options.answers > 1 else None
    return (options.seed + int(number[1] if number else 0)) % 2**63


def seed_of(request_id: str) -> int:
    """A seed for a request that names none: all ranks come to the same one by themselves."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "big") >> 1
