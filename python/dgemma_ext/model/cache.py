"""The key/value cache, which the encode pass appends to and a canvas reads.

Position p of a request is stored in row p % capacity of its slot, in every layer. A full layer's capacity is the
longest context, so nothing is ever overwritten. A sliding layer is a ring of the last window - 1 positions, which is
all that a later query can see. A ring cannot be rewound, so going back means restoring a snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dgemma_ext import arguments
from dgemma_ext.checkpoint import LayerConfig, ModelConfig
from dgemma_ext.torch_state import in_own_torch_state


@dataclass(frozen=True)
class Snapshot:
    """A copy of one slot: for each layer, the rows that hold positions 0 .. length - 1."""

    length: int
    keys: tuple[torch.Tensor, ...]  # [rows, key heads, head dim] each
    values: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))


def layer_capacity(layer: LayerConfig, max_length: int) -> int:
    """Rows that a layer needs for a context of `max_length` positions."""
    if not layer.is_sliding:
        return max_length
    return max(1, min(layer.sliding_window - 1, max_length))


class Cache:
    """Keys and values of `slots` requests, each of up to `max_length` positions.

    `keys[layer]` and `values[layer]` are [slots, capacity, key heads, head dim] in the model's dtype; `lengths` is an
    int32 tensor [slots] beside them for the kernels, and the same numbers are kept on the host.
    """

    @in_own_torch_state
    def __init__(
        self, config: ModelConfig, slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots = arguments.integer("slots", slots, least=1)
        self.max_length = max_length = arguments.integer("max_length", max_length, least=1)
        if max_length > config.max_position_embeddings:
            raise arguments.refusal(
                "max_length", f"in [1, {config.max_position_embeddings}], the model's context", max_length
            )
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for layer in config.layers:
            shape = (slots, layer_capacity(layer, max_length), layer.num_key_value_heads, layer.head_dim)
            # Not zeroed: rows that hold no position are never read, and untouched pages cost no memory.
            self.keys.append(torch.empty(shape, dtype=dtype, device=device))
            self.values.append(torch.empty(shape, dtype=dtype, device=device))
        self._lengths = [0] * slots

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def length(self, slot: int) -> int:
        """The number of positions that the slot holds."""
        return self._lengths[self._checked(slot)]

    def advance(self, slot: int, count: int) -> None:
        """Counts positions that the encode pass has just stored."""
        slot = self._checked(slot)
        length = self._lengths[slot] + count
        if length > self.max_length:
            raise ValueError(f"slot {slot} would hold {length} positions, and max_length is {self.max_length}")
        self._lengths[slot] = length

    def snapshot_nbytes(self, length: int) -> int:
        """Bytes of a snapshot of `length` positions."""
        return sum(min(length, t.shape[1]) * t[0, 0].nbytes for t in (*self.keys, *self.values))

    @in_own_torch_state
    def snapshot(self, slot: int) -> Snapshot:
        """A copy of the slot for `restore`, which may put it into another slot or another cache of the same model."""
        slot = self._checked(slot)
        length = self._lengths[slot]
        return Snapshot(
            length=length,
            keys=tuple(k[slot, : min(length, k.shape[1])].clone() for k in self.keys),
            values=tuple(v[slot, : min(length, v.shape[1])].clone() for v in self.values),
        )

    @in_own_torch_state
    def restore(self, slot: int, saved: Snapshot) -> None:
        """Replaces the slot's content by a snapshot. Raises ValueError for a snapshot that does not fit."""
        slot = self._checked(slot)
        arguments.instance("saved", saved, Snapshot, "a dg.Snapshot")
        if saved.length > self.max_length:
            raise ValueError(f"the snapshot holds {saved.length} positions, and max_length is {self.max_length}")
        if len(saved.keys) != len(self.keys):
            raise ValueError(f"the snapshot has {len(saved.keys)} layers, and this cache {len(self.keys)}")
        for layer, (own, copy) in enumerate(zip(self.keys, saved.keys, strict=True)):
            # A ring of another capacity has its positions in other rows.
            if min(saved.length, own.shape[1]) != copy.shape[0] or own.shape[2:] != copy.shape[1:]:
                raise ValueError(
                    f"layer {layer} of the snapshot is {tuple(copy.shape)}, which does not fit a slot of "
                    f"{tuple(own.shape[1:])} at length {saved.length}"
                )
        for own, copy in zip((*self.keys, *self.values), (*saved.keys, *saved.values), strict=True):
            own[slot, : copy.shape[0]] = copy
        self._lengths[slot] = saved.length

    def free(self, slot: int) -> None:
        """Empties the slot."""
        self._lengths[self._checked(slot)] = 0

    def _checked(self, slot: int) -> int:
        return arguments.integer("slot", slot, end=self.slots)
