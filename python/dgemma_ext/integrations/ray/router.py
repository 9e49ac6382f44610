"""Which replica gets a request: the one of its conversation, unless that is full.

Ray's router of this kind places sessions on a ring of hashes, so that each ingress finds the same replica without
asking anybody, and a replica that comes or goes moves only the conversations of its own part of the ring. It leaves a
conversation's replica only when that takes no more requests at all. Here it is left when its slots are taken and
another has one free: a prefix that is encoded twice costs less than a wait.
"""

from __future__ import annotations

from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica


class ConversationRouter(ConsistentHashRouter):  # type: ignore[misc]
    """slots: how many requests a replica runs at once; further ones wait in it."""

    _slots: int

    def initialize_state(self, slots: int, **settings: Any) -> None:
        super().initialize_state(**settings)
        self._slots = slots

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Lists of replicas, best first: those on the ring that have a free slot, then the others by their queues."""
        ranks: list[list[RunningReplica]] = await super().choose_replicas(candidate_replicas, pending_request)
        ordered = [replica for rank in ranks for replica in rank]
        ordered += [replica for replica in candidate_replicas if replica not in ordered]
        lengths = [self._replica_queue_len_cache.get(replica.replica_id) or 0 for replica in ordered]
        return [[ordered[place]] for place in by_room(lengths, self._slots)]


def by_room(lengths: list[int], slots: int) -> list[int]:
    """The places of replicas, given in the order of preference, in the order in which to ask them."""
    places = range(len(lengths))
    free = [place for place in places if lengths[place] < slots]
    return free + sorted((place for place in places if lengths[place] >= slots), key=lambda place: lengths[place])
