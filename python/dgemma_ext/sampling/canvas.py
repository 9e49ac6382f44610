"""The initial tokens of a request's canvases, pinned tokens, and allowed tokens."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from dgemma_ext import arguments


@dataclass(frozen=True)
class Canvas:
    """The content of a request's first canvases before the first step.

    tokens: ids in place of noise; None in the list leaves that position to noise. Tokens for n canvases fill the first
    n. pinned: one bool per token; a pinned position holds its token in every step and in the committed text. allowed:
    one list of ids for the whole answer, or one list (or None: all) per position; it rules samples and drafts, while
    noise comes from the whole vocabulary, as the model was trained. start_step: the step to begin with,
    for canvases that have tokens; a later step (a lower temperature, fewer steps left) keeps an edit close to its text.

    Lists, arrays and tensors become tuples. Raises ValueError naming the field; what depends on the model is checked
    when a request is submitted.
    """

    tokens: Sequence[int | None] = ()
    pinned: Sequence[bool] | None = None
    allowed: Sequence[int] | Sequence[Sequence[int] | None] | None = None
    start_step: int = 1

    def __post_init__(self) -> None:
        for field, value in (
            ("tokens", _tokens(self.tokens)),
            ("pinned", None if self.pinned is None else _pinned(self.pinned)),
            ("allowed", None if self.allowed is None else _allowed(self.allowed)),
            ("start_step", arguments.integer("canvas.start_step", self.start_step, least=1)),
        ):
            object.__setattr__(self, field, value)

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
            if token is not None and token >= vocabulary:
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
        if self.start_step > max_steps:
            raise ValueError(f"canvas.start_step must be in [1, {max_steps}], got {self.start_step}")
        checked = None
        for position in range(len(self.allowed or ()) if self.allows_by_position else 1):
            ids = self.allowed_at(position)
            if ids is not None and ids is not checked and (not ids or max(ids) >= vocabulary):
                shown = arguments.shown(ids)
                raise ValueError(
                    f"canvas.allowed for position {position} must name ids in [0, {vocabulary}), got {shown}"
                )
            checked = ids

    @property
    def allows_by_position(self) -> bool:
        """Whether `allowed` has a list for each position."""
        allowed: Any = self.allowed
        return bool(allowed) and not isinstance(allowed[0], int)

    def allowed_at(self, position: int) -> tuple[int, ...] | None:
        """The ids that are allowed at a position of the answer; None means all."""
        allowed: Any = self.allowed
        if self.allows_by_position:
            allowed = allowed[position] if position < len(allowed) else None
        return allowed


def _tokens(value: Any) -> tuple[int | None, ...]:
    entries = arguments.sequence("canvas.tokens", value, "a sequence of token ids and None")
    return tuple(
        None if token is None else arguments.integer(f"canvas.tokens[{position}]", token)
        for position, token in enumerate(entries)
    )


def _pinned(value: Any) -> tuple[bool, ...]:
    entries = arguments.sequence("canvas.pinned", value, "a sequence of bools, one per token, or None")
    return tuple(arguments.flag(f"canvas.pinned[{position}]", pinned) for position, pinned in enumerate(entries))


def _allowed(value: Any) -> tuple[int, ...] | tuple[tuple[int, ...] | None, ...]:
    entries = arguments.sequence("canvas.allowed", value, "token ids, or a list of them per position, or None", True)
    if not any(entry is None or _is_ids(entry) for entry in entries):
        return tuple(arguments.integers("canvas.allowed", entries, "token ids"))
    # Positions often share one list, which may have as many ids as the vocabulary: it is read once.
    read: dict[int, tuple[int, ...] | None] = {id(None): None}
    for position, entry in enumerate(entries):
        if id(entry) not in read:
            name = f"canvas.allowed[{position}]"
            read[id(entry)] = tuple(arguments.integers(name, entry, "a list of token ids or None", unordered=True))
    return tuple(read[id(entry)] for entry in entries)


def _is_ids(entry: Any) -> bool:
    return arguments.is_sequence(entry) or isinstance(entry, Set)
