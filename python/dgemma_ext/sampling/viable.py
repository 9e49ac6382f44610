"""Which states of a grammar an answer may be in between its canvases, given tokens that are pinned or allowed later.

A canvas is conditioned on what follows it by the distance to the end of a text. Where later positions are pinned or
allow some tokens alone, that distance is not enough: the states that go on to a text are then found once, when a
request is submitted, backward over its positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dgemma_ext.sampling.canvas import Canvas
from dgemma_ext.sampling.constraint import closing
from dgemma_ext.sampling.grammar import CompiledGrammar

# A distance that no budget reaches.
_NEVER = np.int32(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class AnswerShape:
    """How many tokens an answer may have, where its canvases end, what may follow its text, and by which token a
    thought must be closed."""

    longest: int
    canvas_ends: Sequence[int]
    end_ids: Sequence[int]
    thinking_budget: int | None = None


def grammars_of_canvases(
    grammar: CompiledGrammar, start: int, content: Canvas, shape: AnswerShape
) -> dict[int, CompiledGrammar] | None:
    """The grammar with the distances that hold at the end of a canvas, by where it ends. A canvas that is not here has
    the grammar's own. None where no text matches with these pinned and allowed tokens.
    """
    viable = _viable_states(grammar, content, shape)
    if 0 in viable and not viable[0][start]:
        return None
    return {
        end: replace(grammar, distance=np.where(viable[end], grammar.distance, _NEVER))
        for end in shape.canvas_ends
        if end in viable
    }


def _viable_states(grammar: CompiledGrammar, content: Canvas, shape: AnswerShape) -> dict[int, np.ndarray]:
    """bool [states] for position 0 and for each canvas's end that a restricted position follows."""
    positions, budget = shape.canvas_ends[-1], shape.thinking_budget
    closing_in = np.zeros(grammar.states, np.int32) if grammar.closing is None else grammar.closing
    restrictions = _restrictions(content, positions)
    last = max((position + 1 for position, one in enumerate(restrictions) if one is not None), default=0)
    if last > shape.longest:
        content, last = closing(content, shape.longest, positions, shape.end_ids), positions
        restrictions = _restrictions(content, positions)
    here = grammar.distance <= max(shape.longest - last, 0)
    if budget is not None:
        here = here & (closing_in <= max(budget - last, 0))
    arcs_of, found, settled = dict[int, np.ndarray](), dict[int, np.ndarray](), -1
    for position in reversed(range(last)):
        # Positions that share a list of ids have the same one, which may be as long as the vocabulary.
        restriction = restrictions[position]
        if settled != id(restriction) or position == budget:
            if id(restriction) not in arcs_of:
                arcs_of[id(restriction)] = _arcs_with(grammar, restriction)
            leads_on = arcs_of[id(restriction)] & here[grammar.out_target]
            before = np.logical_or.reduceat(leads_on, grammar.out_begin[:-1])
            if position == budget:
                before &= closing_in == 0
            settled = id(restriction) if np.array_equal(before, here) else -1
            here = before
        if position == 0 or position in shape.canvas_ends:
            found[position] = here
    return found


def _restrictions(content: Canvas, positions: int) -> list[tuple[int, ...] | None]:
    """The tokens that each position may have; None where it may have any."""
    found = [content.allowed_at(position) for position in range(positions)]
    for position, (token, pinned) in enumerate(zip(content.tokens, content.pinned or (), strict=False)):
        if pinned and token is not None and position < positions:
            found[position] = (token,)
    return found


def _arcs_with(grammar: CompiledGrammar, restriction: tuple[int, ...] | None) -> np.ndarray:
    """bool [arcs]: those that one of these tokens takes."""
    if restriction is None:
        return np.ones(grammar.arcs, dtype=bool)
    left = np.zeros(grammar.num_classes, dtype=bool)
    left[grammar.classes[np.array(restriction)]] = True
    return np.logical_or.reduceat(left[grammar.set_class], grammar.set_begin[:-1])[grammar.out_set]
