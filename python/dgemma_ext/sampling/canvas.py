"""The initial tokens of a request's canvases, pinned tokens, and allowed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Canvas:
    """The content of a request's first canvases before the first step.

    tokens: ids in place of noise; None in the list leaves that position to noise. Tokens for n canvases fill the first
    n. pinned: one bool per token; a pinned position holds its token in every step and in the committed text. allowed:
    one list of ids for the whole answer, or one list (or None: all) per position. start_step: the step to begin with,
    for canvases that have tokens; a later step (a lower temperature, fewer steps left) keeps an edit close to its text.
    """

    tokens: Sequence[int | None] = ()
    pinned: Sequence[bool] | None = None
    allowed: Sequence[int] | Sequence[Sequence[int] | None] | None = None
    start_step: int = 1

    def first_step(self, index: int, length: int) -> int:
        """The first step of canvas `index`: start_step where it has tokens, else 1."""
        return self.start_step if len(self.tokens) > index * length else 1

    def certain_length(self, eos_token_ids: Sequence[int]) -> int | None:
        """The number of tokens up to the first pinned end of text; None where none is pinned."""
        pairs = enumerate(zip(self.tokens, self.pinned or (), strict=False), start=1)
        return next((count for count, (token, pinned) in pairs if pinned and token in eos_token_ids), None)

    def check(self, vocabulary: int, max_steps: int) -> None:
        """Raises ValueError naming the field."""
        for position, token in enumerate(self.tokens):
            if token is not None and not 0 <= token < vocabulary:
                raise ValueError(f"canvas.tokens[{position}] must be in [0, {vocabulary}) or None, got {token}")
        if self.pinned is not None:
            if len(self.pinned) != len(self.tokens):
                raise ValueError(
                    f"canvas.pinned must have {len(self.tokens)} entries, one per token, got {len(self.pinned)}"
                )
            for position, (token, pinned) in enumerate(zip(self.tokens, self.pinned, strict=True)):
                if pinned and token is None:
                    raise ValueError(f"canvas.pinned[{position}] is set where canvas.tokens has None")
                allowed = self.allowed_at(position)
                if pinned and allowed is not None and token not in allowed:
                    raise ValueError(
                        f"canvas.pinned[{position}] holds token {token}, which canvas.allowed does not allow"
                    )
        if not 1 <= self.start_step <= max_steps:
            raise ValueError(f"canvas.start_step must be in [1, {max_steps}], got {self.start_step}")
        for position in range(len(self.allowed or ()) if self._allowed_by_position else 1):
            ids = self.allowed_at(position)
            if ids is not None and (not ids or not all(0 <= i < vocabulary for i in ids)):
                raise ValueError(
                    f"canvas.allowed for position {position} must name ids in [0, {vocabulary}), got {ids!r}"
                )

    # Kept, because they are asked for at every position, and a list may have as many ids as the vocabulary.
    @cached_property
    def _allowed_everywhere(self) -> tuple[int, ...]:
        return tuple(self.allowed or ())  # type: ignore[arg-type]

    @cached_property
    def _allowed_by_position(self) -> bool:
        return bool(self.allowed) and not all(isinstance(entry, int) for entry in self.allowed or ())

    def allowed_at(self, position: int) -> tuple[int, ...] | None:
        """The ids that are allowed at a position of the answer; None means all."""
        if self.allowed is None:
            return None
        if not self._allowed_by_position:
            return self._allowed_everywhere
        entry = self.allowed[position] if position < len(self.allowed) else None
        return None if entry is None else tuple(entry)  # type: ignore[arg-type]
