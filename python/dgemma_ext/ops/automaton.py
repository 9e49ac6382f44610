"""A canvas that an automaton over tokens accepts: what stands between `vocabulary_statistics` and `update_canvas_`.

csrc/include/dgemma/automaton.h says what each operator means, and how an arena and its descriptors hold the automata of
a batch. The order of a step is `class_statistics_`, `constrain_`, `sample_class_`. Requests whose descriptor has no
states, and those whose `active` is False, are left as they are. On a GPU automata of at most 4,096 classes are taken,
and what an arena and its descriptors say is not checked.

Shapes: arena int32 [words]; descriptor int64 [batch, DESCRIPTOR_WORDS]; class statistics [batch, length, most_classes];
the others as in ops.denoise. Every function raises ValueError, naming the argument, what it got and what it wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dgemma_ext.ops.operators import operator

DESCRIPTOR_WORDS = 18
# The words of a descriptor behind its four counts: where each table begins. `closing` begins at 0 where there is none.
_TABLES, _CLOSING, _CLOSING_LEFT = (*range(4, 14), 16, 17), 14, 15

_class_statistics, _constrain, _sample_class = (
    operator(name) for name in ("class_statistics_", "constrain_", "sample_class_")
)


class Arrays(Protocol):
    """An automaton as arrays of int32; sampling.grammar.CompiledGrammar is one."""

    @property
    def states(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def arcs(self) -> int: ...
    @property
    def tables(self) -> tuple[np.ndarray, ...]:
        """classes, set_begin, set_class, out_begin, out_target, out_set, in_begin, in_source, in_set, distance, and
        the two of `tokens_by_class`."""
        ...

    @property
    def closing(self) -> np.ndarray | None:
        """int32 [states]: the fewest tokens after which a part that is open is closed; None where none ever is."""
        ...


def tokens_by_class(classes: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens by class and within a class by id, int32 [vocabulary], and before it where each class begins, int32
    [num_classes + 1]; classes: of each id, fewer than 65,536."""
    counts = np.bincount(classes, minlength=num_classes)
    begin = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    # numpy sorts integers of 16 bits by radix.
    return begin, np.argsort(classes.astype(np.uint16), kind="stable").astype(np.int32)


class Automata(NamedTuple):
    """The automata of a batch in one arena, and the most of each that one of them has."""

    arena: Tensor
    descriptor: Tensor
    most_classes: int
    most_states: int
    most_sets: int
    most_words: int  # of all its tables


def pack_automata(automata: Sequence[Arrays | None], closing_left: Sequence[int | None] | None = None) -> Automata:
    """One automaton, or None, for every request; a table that several have is held once.

    closing_left: for each request the tokens of its canvas after which no part of the text is open any more; None for
    one, or for all, where a part may stay open.
    """
    descriptor = np.zeros((len(automata), DESCRIPTOR_WORDS), dtype=np.int64)
    parts, begins, size, most_words = list[np.ndarray](), dict[int, int](), 0, 0
    for row, one in enumerate(automata):
        if one is None:
            continue
        tables = (*one.tables, *([] if one.closing is None else [one.closing]))
        most_words = max(most_words, sum(map(len, tables)))
        for table in tables:
            if id(table) not in begins:
                begins[id(table)] = size
                parts.append(table)
                size += len(table)
        descriptor[row, :4] = one.states, one.num_classes, len(one.tables[1]) - 1, one.arcs
        descriptor[row, _TABLES] = [begins[id(table)] for table in one.tables]
        left = None if closing_left is None else closing_left[row]
        if one.closing is not None and left is not None:
            descriptor[row, _CLOSING], descriptor[row, _CLOSING_LEFT] = begins[id(one.closing)], left
    arena = np.concatenate(parts) if parts else np.zeros(0)
    most = descriptor.max(axis=0, initial=1)
    held = (torch.from_numpy(arena.astype(np.int32)), torch.from_numpy(descriptor))
    return Automata(*held, int(most[1]), int(most[0]), int(most[2]), most_words)


class ClassStatistics(NamedTuple):
    """Of every row and class of tokens."""

    class_max: Tensor  # float32; -inf where no token is allowed
    class_argmax: Tensor  # int32, the id with the greatest raw logit; -1 where none is allowed
    class_mass: Tensor  # float64, sum of exp(z - class_max)
    class_shifted: Tensor  # float64, sum of exp(z - class_max) * (z - class_max)


def make_class_statistics(
    batch: int, length: int, most_classes: int, device: torch.device | str = "cpu"
) -> ClassStatistics:
    shape = (batch, length, most_classes)
    kinds = (torch.float32, torch.int32, torch.float64, torch.float64)
    return ClassStatistics(*(torch.zeros(shape, dtype=kind, device=device) for kind in kinds))


def class_statistics_(
    logits: Tensor,
    softcap: float,
    temperature: Tensor,
    active: Tensor | None,
    allowed: Tensor | None,
    allowed_row: Tensor | None,
    arena: Tensor,
    descriptor: Tensor,
    pinned: Tensor | None,
    canvas: Tensor,
    class_max: Tensor,
    class_argmax: Tensor,
    class_mass: Tensor,
    class_shifted: Tensor,
) -> None:
    """Writes the four class statistics. At a pinned position its token of `canvas` alone takes part."""
    _class_statistics(
        *(logits, softcap, temperature, active, allowed, allowed_row, arena, descriptor, pinned, canvas),
        *(class_max, class_argmax, class_mass, class_shifted),
    )


def constrain_(
    arena: Tensor,
    descriptor: Tensor,
    most_states: int,
    most_sets: int,
    class_max: Tensor,
    class_argmax: Tensor,
    class_mass: Tensor,
    class_shifted: Tensor,
    pinned: Tensor | None,
    active: Tensor | None,
    state: Tensor,
    tokens_left: Tensor,
    max_steps: Tensor,
    seed: Tensor,
    canvas_index: Tensor,
    step: Tensor,
    uniforms: Tensor | None,
    argmax: Tensor,
    entropy: Tensor,
    chosen_class: Tensor,
    remainder: Tensor,
    matches: Tensor,
) -> None:
    """Conditions each canvas on its automaton. Everything from `argmax` on is written.

    state, int32 [batch]: where the text before the canvas has led. tokens_left, int32 [batch]: how many tokens may
    follow the canvas. argmax becomes the most probable canvas that is accepted, entropy the acceptance key;
    chosen_class, int32 [batch, length], and remainder, float64, are a joint draw's classes and what `sample_class_`
    draws their tokens with. matches, int32 [batch]: 0 where no canvas is accepted, else 1.
    """
    _constrain(
        *(arena, descriptor, most_states, most_sets, class_max, class_argmax, class_mass, class_shifted, pinned),
        *(active, state, tokens_left, max_steps, seed, canvas_index, step, uniforms),
        *(argmax, entropy, chosen_class, remainder, matches),
    )


def sample_class_(
    logits: Tensor,
    softcap: float,
    temperature: Tensor,
    active: Tensor | None,
    allowed: Tensor | None,
    allowed_row: Tensor | None,
    arena: Tensor,
    descriptor: Tensor,
    pinned: Tensor | None,
    chosen_class: Tensor,
    remainder: Tensor,
    matches: Tensor,
    tokens: Tensor,
) -> None:
    """Writes the drawn token of every position that is not pinned into `tokens`, int32 [batch, length]."""
    _sample_class(
        *(logits, softcap, temperature, active, allowed, allowed_row, arena, descriptor, pinned),
        *(chosen_class, remainder, matches, tokens),
    )
