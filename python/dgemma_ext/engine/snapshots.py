"""A store of cache snapshots by their token ids, from which a conversation continues."""

from __future__ import annotations

from dgemma_ext.model import Snapshot


class SnapshotStore:
    """At most `limit` snapshots, the newest last."""

    def __init__(self, limit: int = 4) -> None:
        self.limit = limit
        self._saved: list[tuple[tuple[int, ...], Snapshot]] = []

    def __len__(self) -> int:
        return len(self._saved)

    def add(self, ids: list[int], saved: Snapshot) -> None:
        if len(ids) != saved.length:
            raise ValueError(f"a snapshot of {saved.length} positions cannot stand for {len(ids)} ids")
        self._saved = [entry for entry in self._saved if entry[0] != tuple(ids)]
        self._saved.append((tuple(ids), saved))
        del self._saved[: max(0, len(self._saved) - self.limit)]

    def longest_prefix(self, ids: list[int]) -> Snapshot | None:
        """The longest snapshot whose ids are a prefix of `ids`, or None."""
        fitting = [saved for kept, saved in self._saved if tuple(ids[: len(kept)]) == kept]
        return max(fitting, key=lambda saved: saved.length, default=None)
