"""The requests in vLLM's slots: their canvases, contents and grammars."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dgemma_ext.checkpoint import Tokenizer, resolve_checkpoint
from dgemma_ext.engine.matching import Matching, matching_of
from dgemma_ext.integrations.vllm.contents import Contents
from dgemma_ext.integrations.vllm.request_options import Limits, check, options_of
from dgemma_ext.integrations.vllm.slots import Slots
from dgemma_ext.sampling import Canvas, Constraint


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
        a preemption. Raises ValueError naming what is wrong in extra_args."""
        self.clear(slot)
        options = options_of(extra_args)
        sampler = check(options, self.limits, max_tokens)
        seed = seed_of(request_id) if options.seed is None else options.seed
        content = options.canvas or Canvas()
        if options.grammar is not None:
            limits = self.limits
            tokenizer, pad_id = tokenizer_of(self._model), limits.defaults.pad_token_id
            answer = (list(prompt), sampler, max_tokens, options.canvas)
            matching = matching_of(options.grammar, tokenizer, limits.vocabulary, pad_id, *answer)
            matching.follow(answered)
            self._matchings[slot], content = matching, matching.content
        self.slots.place(slot, sampler, seed, len(answered) // sampler.canvas_length, content)
        self.contents.place(slot, content)

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


def seed_of(request_id: str) -> int:
    """A seed for a request that names none: all ranks come to the same one by themselves."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "big") >> 1
