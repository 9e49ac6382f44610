"""Copies of cache slots by their token ids, from which later requests and turns continue.

A store of snapshots with a budget of bytes: those of the longest time without use go first. It finds the longest
snapshot that is a prefix of a prompt by the hashes of all prefixes, which are one pass over its ids.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dgemma_ext import arguments
from dgemma_ext.model import Snapshot

# Slots for which a chat has room in its cache.
USUAL_SNAPSHOTS = 4

# Prompts that are remembered to see what a new one shares with them, and the least that is worth a pass and a snapshot
# of its own.
_REMEMBERED_PROMPTS = 32
_LEAST_SHARED = 64

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that powers of it are different


@dataclass(frozen=True)
class _Entry:
    ids: NDArray[np.int32]
    saved: Snapshot


class PrefixCache:
    """Snapshots of up to `max_bytes` in all.

    `key` tells apart what ids alone do not: the same ids under another key are another prefix. `nbytes` counts the
    snapshots' tensors. Not for several threads at once; the scheduler's calls take turns.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = arguments.integer("max_bytes", max_bytes, end=2**63)
        self.nbytes = 0
        self._entries: OrderedDict[tuple[Hashable, int, int], _Entry] = OrderedDict()  # the newest last
        self._lengths: dict[Hashable, Counter[int]] = {}  # key → length → number of snapshots
        self._seen: deque[tuple[Hashable, NDArray[np.int32]]] = deque(maxlen=_REMEMBERED_PROMPTS)

    def __len__(self) -> int:
        return len(self._entries)

    def longest_prefix(self, ids: Sequence[int], key: Hashable = None) -> Snapshot | None:
        """The longest snapshot whose ids are a prefix of `ids`, or None. It counts as used."""
        wanted = _array(ids)
        hashes = _prefix_hashes(wanted)
        for length in sorted(self._lengths.get(key, ()), reverse=True):
            if length <= len(wanted):
                place = (key, length, int(hashes[length]))
                found = self._entries.get(place)
                if found is not None and np.array_equal(found.ids, wanted[:length]):
                    self._entries.move_to_end(place)
                    return found.saved
        return None

    def make_room(self, ids: Sequence[int], nbytes: int, key: Hashable = None) -> bool:
        """Whether a snapshot of so many bytes should be taken for these ids: they have none, and the budget has room.

        Snapshots that `add` would drop are dropped here, before the memory of the new one is taken.
        """
        place, array = _place(ids, key)
        known = self._entries.get(place)
        if known is not None and np.array_equal(known.ids, array):
            self._entries.move_to_end(place)
            return False
        if nbytes > self.max_bytes:
            return False
        if known is not None:  # other ids with the same hash
            self._drop(place)
        while self.nbytes + nbytes > self.max_bytes:
            self._drop(next(iter(self._entries)))
        return True

    def add(self, ids: Sequence[int], saved: Snapshot, key: Hashable = None) -> None:
        """Keeps a snapshot, where the budget has room and the ids have none."""
        if len(ids) != arguments.instance("saved", saved, Snapshot, "a dg.Snapshot").length:
            raise ValueError(f"a snapshot of {saved.length} positions cannot stand for {len(ids)} ids")
        if self.make_room(ids, saved.nbytes, key):
            place, array = _place(ids, key)
            self._entries[place] = _Entry(array, saved)
            self._lengths.setdefault(key, Counter())[saved.length] += 1
            self.nbytes += saved.nbytes

    def shared_length(self, ids: Sequence[int], cached: int, key: Hashable = None) -> int:
        """The length of the beginning that a prompt shares with an earlier one, where a snapshot there is worth its
        pass: the prompt goes on, and `cached` positions are there already. Otherwise 0. Remembers the prompt."""
        wanted = _array(ids)
        shared = max((_common(wanted, seen) for other, seen in self._seen if other == key), default=0)
        if not any(other == key and np.array_equal(seen, wanted) for other, seen in self._seen):
            self._seen.append((key, wanted))
        return shared if cached + _LEAST_SHARED <= shared < len(wanted) else 0

    def clear(self) -> None:
        """Drops all snapshots."""
        self._entries.clear()
        self._lengths.clear()
        self._seen.clear()
        self.nbytes = 0

    def _drop(self, place: tuple[Hashable, int, int]) -> None:
        dropped = self._entries.pop(place)
        self.nbytes -= dropped.saved.nbytes
        key, length, _ = place
        lengths = self._lengths[key]
        lengths[length] -= 1
        if not lengths[length]:
            del lengths[length]
        if not lengths:
            del self._lengths[key]


def _array(ids: Sequence[int]) -> NDArray[np.int32]:
    return np.fromiter(ids, dtype=np.int32, count=len(ids))


def _place(ids: Sequence[int], key: Hashable) -> tuple[tuple[Hashable, int, int], NDArray[np.int32]]:
    array = _array(ids)
    return (key, len(array), int(_prefix_hashes(array)[-1])), array


def _prefix_hashes(ids: NDArray[np.int32]) -> NDArray[np.uint64]:
    """uint64 [n + 1]: the hash of the first i ids, a polynomial modulo 2^64. Ids are compared wherever it matters."""
    powers = np.cumprod(np.full(len(ids), _FACTOR))
    return np.concatenate((np.zeros(1, np.uint64), np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * powers)))


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """The length of the longest common prefix."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
