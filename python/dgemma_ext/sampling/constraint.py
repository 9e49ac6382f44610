"""A request's grammar during its canvases: where its text has led so far, and the operators that hold a step to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dgemma_ext.errors import GrammarError
from dgemma_ext.ops import automaton
from dgemma_ext.ops.denoise import CanvasStatus
from dgemma_ext.sampling.canvas import Canvas
from dgemma_ext.sampling.grammar import CompiledGrammar
from dgemma_ext.sampling.state import CanvasState


@dataclass(frozen=True)
class Constraint:
    """state: where the text before the canvas has led. tokens_left: how many tokens may follow the canvas.

    closing_left: after how many tokens of the canvas no thought may be open; None: it may stay open.
    """

    grammar: CompiledGrammar
    state: int
    tokens_left: int
    closing_left: int | None = None


def constrain(
    constraints: Sequence[Constraint | None],
    logits: Tensor,
    params: Mapping[str, Any],
    state: CanvasState,
    uniforms: Tensor | None,
    argmax: Tensor,
    sampled: Tensor,
) -> dict[int, GrammarError]:
    """Makes the draft, the draw and the acceptance key of a step what they are given its requests' grammars.

    Writes argmax, sampled and the state's entropy. A row for which no canvas matches is no longer active, and its
    status is that of a step that failed; returned are these rows with their errors.
    """
    packed = _packed(tuple(None if one is None else (one.grammar, one.closing_left) for one in constraints))
    batch, length = state.canvas.shape
    statistics = automaton.make_class_statistics(batch, length, packed.most_classes)
    chosen, remainder = torch.zeros_like(state.canvas), torch.zeros(batch, length, dtype=torch.float64, device="cpu")
    matches = torch.ones(batch, dtype=torch.int32, device="cpu")
    held: dict[str, Any] = {"arena": packed.arena, "descriptor": packed.descriptor, "pinned": state.pinned}
    automaton.class_statistics_(logits, **params, **held, canvas=state.canvas, **statistics._asdict())
    automaton.constrain_(
        **held,
        most_states=packed.most_states,
        most_sets=packed.most_sets,
        **statistics._asdict(),
        active=params["active"],
        state=_numbers([0 if one is None else one.state for one in constraints]),
        tokens_left=_numbers([0 if one is None else one.tokens_left for one in constraints]),
        max_steps=state.max_steps,
        seed=state.seed,
        canvas_index=state.canvas_index,
        step=state.step,
        uniforms=uniforms,
        argmax=argmax,
        entropy=state.entropy,
        chosen_class=chosen,
        remainder=remainder,
        matches=matches,
    )
    automaton.sample_class_(
        logits, **params, **held, chosen_class=chosen, remainder=remainder, matches=matches, tokens=sampled
    )
    failed = (matches == 0).nonzero().flatten().tolist()
    for row in failed:
        state.active[row].zero_()
        state.status[row].fill_(CanvasStatus.NON_FINITE)
    return {row: GrammarError("no canvas matches it") for row in failed}


def closing(content: Canvas | None, end: int, positions: int, end_ids: Sequence[int]) -> Canvas:
    """The content of an answer whose text ends within `end` tokens: what its canvases have beyond is its end alone.

    positions: of all its canvases. end_ids: the end-of-sequence tokens and the padding token.
    """
    content = content or Canvas()
    if positions <= end:
        return content
    allowed = [content.allowed_at(position) for position in range(end)]
    return replace(content, allowed=(*allowed, *[tuple(end_ids)] * (positions - end)))


def _numbers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


@lru_cache(maxsize=16)
def _packed(held: tuple[tuple[CompiledGrammar, int | None] | None, ...]) -> automaton.Automata:
    grammars, left = zip(*[one or (None, None) for one in held], strict=True)
    return automaton.pack_automata(grammars, left)
