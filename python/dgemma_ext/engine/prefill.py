"""Brings the tokens that a canvas sees into its slot: from the prefix cache, by passes of their own, or with the
canvas's first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgemma_ext.engine.prefix_cache import PrefixCache
from dgemma_ext.engine.request import Request
from dgemma_ext.model import BASE, Cache, Network, PrefillChunk
from dgemma_ext.model.vision import Vision


class Prefill:
    """The encoding of a scheduler's requests. prefixes: the prefix cache, None without one. vision: the model's tower,
    None without one; it runs when a prompt's images are encoded, and not for those that the prefix cache has."""

    def __init__(self, network: Network, cache: Cache, prefixes: PrefixCache | None, vision: Vision | None) -> None:
        self._network, self._cache, self._prefixes, self.vision = network, cache, prefixes, vision

    def restore(self, request: Request, others: Sequence[Request]) -> bool:
        """Puts what the prefix cache has of a prompt into the slot. Returns whether others begin with the prompt.

        No prefix ends within an image: its soft tokens see each other, so they are encoded together.
        """
        prefixes, tokens = self._prefixes, request._tokens
        if prefixes is None or tokens.cached:
            return False
        keys = tokens.keys
        saved = prefixes.longest_prefix(keys, request.prefix_key)
        if saved is not None and tokens.uncut(saved.length) == saved.length:
            self._cache.restore(request._slot, saved)
            request.cached_tokens = tokens.cached = saved.length
        shared = tokens.uncut(prefixes.shared_length(keys, tokens.cached, request.prefix_key))
        if shared > tokens.cached:
            self.encode(request, shared - tokens.cached)
        alike = [other._tokens.keys for other in others if other.prefix_key == request.prefix_key]
        return any(other[: len(keys)] == keys for other in alike)

    def encode(self, request: Request, count: int) -> None:
        """Encodes the next `count` tokens that a canvas sees in passes of their own."""
        begin = request._tokens.cached
        ids = torch.tensor([request._tokens.ids[begin : begin + count]], device="cpu")
        images = self._features(request, begin, begin + count)
        adapter = request._adapter or BASE
        self._network.encode(ids, self._cache, slots=[request._slot], images=[images], adapter=adapter)
        self.note(request, count)

    def chunk(self, request: Request) -> PrefillChunk | None:
        """What the canvas's first step encodes; None where the slot holds all that it sees."""
        tokens = request._tokens
        if not tokens.waiting:
            return None
        begin = tokens.cached
        # The copy does not wait for the GPU's queued work.
        ids = torch.tensor(tokens.ids[begin:], device="cpu").to(self._network.device, non_blocking=True)
        images = self._features(request, begin, len(tokens.ids))
        return self._network.prefill_chunk(request._slot, ids, begin, images, adapter=request._adapter)

    def note(self, request: Request, count: int) -> None:
        """Records that the slot holds `count` more tokens; the prefix cache takes a copy."""
        if count:
            request._tokens.cached += count
            length, prefixes = request._tokens.cached, self._prefixes
            if prefixes is None:
                return
            keys, key = request._tokens.keys[:length], request.prefix_key
            if prefixes.make_room(keys, self._cache.snapshot_nbytes(length), key):
                prefixes.add(keys, self._cache.snapshot(request._slot), key)

    def _features(self, request: Request, begin: int, end: int) -> list[tuple[int, Tensor]]:
        """The images in [begin, end) as `Network.encode` takes them."""
        placed = request._tokens.images_between(begin, end)
        if not placed or self.vision is None:
            return []
        return [(one.start, self.vision.features(one.image)) for one in placed]
