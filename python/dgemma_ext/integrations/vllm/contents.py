"""What requests give for their canvases - tokens, pins, allowed ids - in tables that a step reads on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dgemma_ext.ops import denoise
from dgemma_ext.sampling import Canvas


class Window(NamedTuple):
    """The contents of n canvases, [n, L] each."""

    tokens: Tensor  # int32, -1 for noise
    pinned: Tensor  # bool
    allowed_row: Tensor  # int32: the row of `Contents.allowed`, -1 where all ids are allowed


class Contents:
    """The contents of `slots` requests with canvases of up to `length` positions.

    The tables are made when the first request with a content comes, and are as wide as the longest needs; `allowed`
    has a row for each set of ids that a request has at the moment.
    """

    def __init__(self, slots: int, length: int, vocabulary: int, device: torch.device) -> None:
        self._slots, self._length, self._vocabulary, self._device = slots, length, vocabulary, device
        self._sets: dict[tuple[int, ...], int] = {}
        self._sets_of: dict[int, list[tuple[int, ...]]] = {}
        self._held: set[int] = set()
        self.allowed = torch.zeros(0, -(-vocabulary // 32), dtype=torch.int32, device=device)
        self.version = 0  # changes with `allowed`
        self._tokens, self._pinned, self._allowed_row = (torch.zeros(0), torch.zeros(0), torch.zeros(0))
        self._everywhere = torch.full((slots,), -1, dtype=torch.int32, device=device)
        self._width = 0

    def place(self, slot: int, content: Canvas) -> None:
        """Writes a request's content into a slot in place of what was there."""
        self.clear(slot)
        by_position = content.allows_by_position
        width = max(len(content.tokens), len(content.allowed or ()) if by_position else 0)
        if not width and content.allowed is None:
            return
        self._widen(max(width, 1))
        rows = [self._row(slot, content.allowed_at(position)) for position in range(width)]
        everywhere = -1 if by_position else self._row(slot, content.allowed_at(width))
        pinned = content.pinned or [False] * len(content.tokens)
        for table, values, rest in (
            (self._tokens, [-1 if token is None else token for token in content.tokens], -1),
            (self._pinned, list(pinned), False),
            (self._allowed_row, rows, everywhere),
        ):
            row = torch.full((self._width,), rest, dtype=table.dtype, device="cpu")
            row[: len(values)] = torch.tensor(values, dtype=table.dtype, device="cpu")
            table[slot].copy_(row, non_blocking=True)
        self._everywhere[slot].fill_(everywhere)
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        if slot in self._held:
            self._held.discard(slot)
            self._tokens[slot].fill_(-1)
            self._pinned[slot].fill_(False)
            self._allowed_row[slot].fill_(-1)
            self._everywhere[slot].fill_(-1)
        self._sets_of.pop(slot, None)
        kept = {ids for sets in self._sets_of.values() for ids in sets}
        for ids in [ids for ids in self._sets if ids not in kept]:
            del self._sets[ids]

    def any_of(self, slots: list[int]) -> bool:
        """Whether one of these slots has a content."""
        return not self._held.isdisjoint(slots)

    def rules(self, slots: list[int]) -> bool:
        """Whether one of these slots allows some ids only."""
        return any(slot in self._sets_of for slot in slots)

    def window(self, slots: Tensor, canvas_index: Tensor, width: Tensor) -> Window:
        """The contents of canvas `canvas_index`, of `width` positions, of some slots, int64 [n]."""
        positions = torch.arange(self._length, device=self._device)
        at = canvas_index.to(torch.int64)[:, None] * width[:, None] + positions
        inside = (positions < width[:, None]) & (at < self._width)
        at = at.clamp(max=self._width - 1)

        def read(table: Tensor, rest: Tensor | int) -> Tensor:
            return torch.where(inside, table.index_select(0, slots).gather(1, at), rest).to(table.dtype)

        everywhere = self._everywhere.index_select(0, slots)[:, None]
        return Window(read(self._tokens, -1), read(self._pinned, 0), read(self._allowed_row, everywhere))

    def _row(self, slot: int, ids: tuple[int, ...] | None) -> int:
        """The row of a set of ids, written where it is a new one."""
        if ids is None:
            return -1
        found = self._sets.get(ids)
        if found is None:
            taken = set(self._sets.values())
            found = next(row for row in range(len(taken) + 1) if row not in taken)
            self._write(found, ids)
            self._sets[ids] = found
        sets = self._sets_of.setdefault(slot, [])
        if ids not in sets:
            sets.append(ids)
        return found

    def _write(self, row: int, ids: tuple[int, ...]) -> None:
        if row >= self.allowed.shape[0]:
            more = self.allowed.new_zeros(max(2 * row, 8), self.allowed.shape[1])
            more[: self.allowed.shape[0]].copy_(self.allowed)
            self.allowed = more
        self.allowed[row].copy_(denoise.pack_allowed([ids], self._vocabulary)[0], non_blocking=True)
        self.version += 1

    def _widen(self, width: int) -> None:
        if width <= self._width:
            return
        width = -(-width // self._length) * self._length
        tables = []
        for table, rest, dtype in (
            (self._tokens, -1, torch.int32),
            (self._pinned, False, torch.bool),
            (self._allowed_row, -1, torch.int32),
        ):
            wide = torch.full((self._slots, width), rest, dtype=dtype, device=self._device)
            if dtype == torch.int32 and table is self._allowed_row:
                wide.copy_(self._everywhere[:, None].expand_as(wide))
            if self._width:
                wide[:, : self._width].copy_(table)
            tables.append(wide)
        self._tokens, self._pinned, self._allowed_row = tables
        self._width = width
