"""The thought before an answer: `<|channel>thought\\n...<channel|>`.

A model that is told to think writes one, and another may write an empty one. Each grammar says what of this it takes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dgemma_ext.errors import GrammarError
from dgemma_ext.sampling.grammar.compiled import FAILED, CompiledGrammar
from dgemma_ext.sampling.grammar.pattern import (
    ANY,
    EMPTY,
    LARGEST_SYMBOL,
    Pattern,
    concat,
    literal,
    optional,
    repeat,
    symbol,
)

OPEN, CLOSE = "<|channel>", "<channel|>"
# What a prompt has that lets the model think.
THINK = "<|think|>"
THINKING = ("auto", "none", "required")


def with_thought(answer: Pattern, thinking: str, thinks: bool, markers: Mapping[str, int]) -> Pattern:
    """The answer with what may stand before it: a thought where `thinking` or the prompt asks for one, else an empty
    one at most.

    thinking: of THINKING. thinks: whether the prompt lets the model think. markers: special tokens by their text; a
    model without those of thoughts writes none. Raises GrammarError where one is required of such a model.
    """
    if any(markers.get(marker, LARGEST_SYMBOL + 1) > LARGEST_SYMBOL for marker in (OPEN, CLOSE)):
        if thinking == "required":
            raise GrammarError(f"thinking is required, and the tokenizer has no {OPEN} and {CLOSE} with small ids")
        return answer
    may_think = thinking == "required" or (thinking == "auto" and thinks)
    content = repeat(ANY) if may_think else EMPTY
    thought = concat(symbol(markers[OPEN]), literal("thought\n"), content, symbol(markers[CLOSE]))
    return concat(thought if thinking == "required" else optional(thought), answer)


def closing_distances(grammar: CompiledGrammar, markers: Mapping[str, int]) -> np.ndarray | None:
    """int32 [states]: the fewest tokens after which the thought that is open in a state, or must still come, is closed;
    0 for other states. None for a grammar without thoughts."""
    if OPEN not in markers or CLOSE not in markers:
        return None
    opened = grammar.after(grammar.start, markers[OPEN])
    if opened == FAILED:
        return None
    is_close = grammar.set_class[grammar.set_begin[:-1]] == grammar.classes[markers[CLOSE]]  # it is a set by itself
    inside, open_states = [opened], {opened}
    first, end = grammar.out_begin[grammar.start], grammar.out_begin[grammar.start + 1]
    if (grammar.out_target[first:end] == opened).all():  # it must be opened
        open_states.add(grammar.start)
    for state in inside:
        for arc in range(grammar.out_begin[state], grammar.out_begin[state + 1]):
            target = int(grammar.out_target[arc])
            if target not in open_states and not is_close[grammar.out_set[arc]]:
                open_states.add(target)
                inside.append(target)
    found = np.zeros(grammar.states, dtype=np.int32)
    left, steps = open_states, 0
    while left:
        steps += 1
        nearer = {
            state
            for state in left
            if any(
                is_close[grammar.out_set[arc]] if steps == 1 else int(grammar.out_target[arc]) not in left
                for arc in range(grammar.out_begin[state], grammar.out_begin[state + 1])
            )
        }
        found[list(nearer)] = steps
        left = left - nearer
    return found
