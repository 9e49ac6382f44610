"""A request's grammar during its canvases, and the grammars of a batch's rows where a step's operators read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dgemma_ext.ops import automaton
from dgemma_ext.sampling.canvas import Canvas
from dgemma_ext.sampling.grammar import CompiledGrammar


@dataclass(frozen=True)
class Constraint:
    """state: where the text before the canvas has led. tokens_left: how many tokens may follow the canvas.

    closing_left: after how many tokens of the canvas no thought may be open; None: it may stay open.
    """

    grammar: CompiledGrammar
    state: int
    tokens_left: int
    closing_left: int | None = None


class ConstraintRows(NamedTuple):
    """What the operators read of some rows (ops.automaton): views, and the greatest sizes of their automata."""

    arena: Tensor
    descriptor: Tensor  # int64 [B, DESCRIPTOR_WORDS]; zeros for a row without a grammar
    state: Tensor  # int32 [B]
    tokens_left: Tensor  # int32 [B]
    most_classes: int
    most_states: int
    most_sets: int


class Constraints:
    """The constraints of a batch's rows, and their tensors on its device.

    Rows may change at any time; `update` then writes what they have into the tensors, in the order of the stream. The
    tensors keep their addresses and the sizes their values, so a captured step reads what was written last, until a
    grammar comes that is larger than all before it: then `version` changes, and a step that was captured must not run.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.version = 0
        self._by_row: dict[int, Constraint] = {}
        self._rows, self._is_written = rows, True
        self._arena = torch.zeros(0, dtype=torch.int32, device=device)
        self._descriptor = torch.zeros(rows, automaton.DESCRIPTOR_WORDS, dtype=torch.int64, device=device)
        self._state = torch.zeros(rows, dtype=torch.int32, device=device)
        self._tokens_left = torch.zeros(rows, dtype=torch.int32, device=device)
        self._most = (1, 1, 1, 0)
        self._packed: list[tuple[CompiledGrammar, int | None] | None] = []

    def place(self, row: int, constraint: Constraint) -> None:
        self._by_row[row], self._is_written = constraint, False

    def clear(self, row: int) -> None:
        """No-op for a row without a grammar."""
        if self._by_row.pop(row, None) is not None:
            self._is_written = False

    def move(self, source: int, target: int) -> None:
        self.clear(target)
        if source in self._by_row:
            self.place(target, self._by_row.pop(source))

    def any_between(self, begin: int, end: int) -> bool:
        """Whether one of these rows has a grammar."""
        return any(begin <= row < end for row in self._by_row)

    def update(self) -> None:
        """Writes what has changed."""
        if self._is_written:
            return
        self._is_written = True
        rows = [self._by_row.get(row) for row in range(self._rows)]
        self._pack([None if row is None else (row.grammar, row.closing_left) for row in rows])
        for tensor, values in (
            (self._state, [0 if row is None else row.state for row in rows]),
            (self._tokens_left, [0 if row is None else row.tokens_left for row in rows]),
        ):
            tensor.copy_(torch.tensor(values, dtype=torch.int32, device="cpu"), non_blocking=True)

    def rows_between(self, begin: int, end: int) -> ConstraintRows:
        """As of the last `update`."""
        rows = slice(begin, end)
        return ConstraintRows(
            self._arena, self._descriptor[rows], self._state[rows], self._tokens_left[rows], *self._most[:3]
        )

    def _pack(self, held: list[tuple[CompiledGrammar, int | None] | None]) -> None:
        """Writes arena and descriptors, where they are others than the last time."""
        if held == self._packed:
            return
        grammars, closing_left = zip(*[one or (None, None) for one in held], strict=True)
        packed = automaton.pack_automata(grammars, closing_left)
        most = (packed.most_classes, packed.most_states, packed.most_sets, packed.most_words)
        if any(new > old for new, old in zip(most, self._most, strict=True)):
            # Powers of two, so that a slightly larger grammar does not change them again; and room for one in each row.
            self._most = tuple(max(old, _power(new)) for new, old in zip(most, self._most, strict=True))  # type: ignore[assignment]
            room = self._rows * self._most[-1]
            self._arena = torch.zeros(room, dtype=torch.int32, device=self._descriptor.device)
            self.version += 1
        self._arena[: packed.arena.numel()].copy_(packed.arena, non_blocking=True)
        self._descriptor.copy_(packed.descriptor, non_blocking=True)
        self._packed = held


def closing(content: Canvas | None, end: int, positions: int, end_ids: Sequence[int]) -> Canvas:
    """The content of an answer whose text ends within `end` tokens: what its canvases have beyond is its end alone.

    positions: of all its canvases. end_ids: the end-of-sequence tokens and the padding token.
    """
    content = content or Canvas()
    if positions <= end:
        return content
    allowed = [content.allowed_at(position) for position in range(end)]
    return replace(content, allowed=(*allowed, *[tuple(end_ids)] * (positions - end)))


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()
