"""A store of cache snapshots by their token ids, from which a conversation continues."""

from __future__ import annotations

from collections.abc import Sequence

from dgemma_ext import arguments
from dgemma_ext.model import Snapshot

# Each takes as much memory as the cache of its positions.
USUAL_SNAPSHOTS = 4


class SnapshotStore:
    """At most `limit` snapshots, the newest last."""

    def __init__(self, limit: int = USUAL_SNAPSHOTS) -> None:
        self.limit = arguments.integer("limit", limit)
        self._saved: list[tuple[tuple[int, ...], Snapshot]] = []

    def __len__(self) -> int:
        return len(self._saved)

    def make_room(self, ids: Sequence[int]) -> None:
        """Drops what `add` would drop, before the memory of the new snapshot is taken."""
        self._saved = [entry for entry in self._saved if entry[0] != tuple(ids)]
        del self._saved[: max(0, len(self._saved) + 1 - self.limit)]

    def add(self, ids: Sequence[int], saved: Snapshot) -> None:
        kept = tuple(arguments.integers("ids", ids, "token ids"))
        if len(kept) != arguments.instance("saved", saved, Snapshot, "a dg.Snapshot").length:
            raise ValueError(f"a snapshot of {saved.length} positions cannot stand for {len(kept)} ids")
        self.make_room(kept)
        if self.limit:
            self._saved.append((kept, saved))

    def longest_prefix(self, ids: Sequence[int]) -> Snapshot | None:
        """The longest snapshot whose ids are a prefix of `ids`, or None."""
        wanted = tuple(arguments.integers("ids", ids, "token ids"))
        fitting = [saved for kept, saved in self._saved if wanted[: len(kept)] == kept]
        return max(fitting, key=lambda saved: saved.length, default=None)
