"""Random automata over a small vocabulary, and a step's operators over them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoise_cases import softmax_statistics
from dgemma_ext.ops import automaton, denoise
from reference.automaton import Arcs

# The functions of a step, of dgemma_ext.ops or like them (automaton_library.py).
Operators = SimpleNamespace
OPERATORS = Operators(
    vocabulary_statistics=denoise.vocabulary_statistics,
    sample=denoise.sample,
    class_statistics_=automaton.class_statistics_,
    constrain_=automaton.constrain_,
    sample_class_=automaton.sample_class_,
)


@dataclass
class Small:
    """An automaton as the operators read it, made of arcs by hand."""

    arcs_of: Arcs
    states: int
    num_classes: int
    tables: tuple[np.ndarray, ...]
    closing: np.ndarray | None = None

    @property
    def arcs(self) -> int:
        return len(self.tables[4])

    def class_order(self) -> list[list[list[int]]]:
        """The tokens of each state's classes, in the order of its arcs."""
        classes, set_begin, set_class, out_begin, _, out_set = self.tables[:6]
        return [
            [
                np.nonzero(classes == k)[0].tolist()
                for arc in range(out_begin[q], out_begin[q + 1])
                for k in set_class[set_begin[out_set[arc]] : set_begin[out_set[arc] + 1]]
            ]
            for q in range(self.states)
        ]


def small(delta: np.ndarray, distance: list[int]) -> Small:
    """delta: int [states, vocabulary], -1 where a token leads nowhere."""
    states, vocabulary = delta.shape
    columns: dict[tuple[int, ...], int] = {(-1,) * states: 0}
    classes = np.array([columns.setdefault(tuple(delta[:, v].tolist()), len(columns)) for v in range(vocabulary)])
    sets: dict[tuple[int, ...], int] = {}
    arcs = []
    for q in range(states):
        targets: dict[int, list[int]] = {}
        for column, k in columns.items():
            if column[q] >= 0:
                targets.setdefault(column[q], []).append(k)
        arcs += [(q, target, sets.setdefault(tuple(ks), len(sets))) for target, ks in targets.items()]
    if not sets:
        sets[(0,)] = 0
    out = np.array(sorted(arcs), dtype=np.int32).reshape(-1, 3)
    into = np.array(sorted(arcs, key=lambda a: (a[1], a[0])), dtype=np.int32).reshape(-1, 3)

    def begins(counts: Any, size: int) -> np.ndarray:
        return np.searchsorted(counts, np.arange(size + 1)).astype(np.int32)

    tables = (
        classes.astype(np.int32),
        np.cumsum([0, *map(len, sets)]).astype(np.int32),
        np.array([k for ks in sets for k in ks], dtype=np.int32),
        *(begins(out[:, 0], states), out[:, 1].copy(), out[:, 2].copy()),
        *(begins(into[:, 1], states), into[:, 0].copy(), into[:, 2].copy()),
        np.array(distance, dtype=np.int32),
        *automaton.tokens_by_class(classes, len(columns)),
    )
    arcs_of = {(q, v): int(delta[q, v]) for q in range(states) for v in range(vocabulary) if delta[q, v] >= 0}
    return Small(arcs_of, states, len(columns), tables)


def one_state(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Arena and descriptor of an automaton of one state and one class that goes on with every token."""
    one_arc = ([0, 1], [0], [0])
    tables = ([0] * vocabulary, [0, 1], [0], *one_arc, *one_arc, [0], [0, vocabulary], range(vocabulary))
    begins = [sum(map(len, tables[:n])) for n in range(len(tables))]
    arena = torch.tensor([word for table in tables for word in table], dtype=torch.int32)
    return arena, torch.tensor([[1, 1, 1, 1, *begins[:10], 0, 0, *begins[10:]]])


def random_automaton(random: np.random.Generator, vocabulary: int) -> Small:
    states = int(random.integers(1, 5))
    delta = np.where(random.random((states, vocabulary)) < 0.35, -1, random.integers(0, states, (states, vocabulary)))
    return small(delta, [int(d) for d in random.integers(0, 4, states)])


def step(
    automata: list[Any],
    logits: Tensor,
    state: list[int],
    tokens_left: list[int],
    uniforms: Tensor | None = None,
    pinned: Tensor | None = None,
    canvas: Tensor | None = None,
    on: Operators = OPERATORS,
    **changes: Any,
) -> dict[str, Tensor]:
    """A step's operators from the statistics to the draw; logits [B, L, V], outputs by name."""
    batch, length, _ = logits.shape
    params: dict[str, Any] = {
        "logits": logits,
        "softcap": 0.0,
        "temperature": torch.ones(batch),
        "active": None,
        "allowed": None,
        "allowed_row": None,
    }
    params |= {name: value for name, value in changes.items() if name in params}
    of = changes.get("numbers", [0] * batch)
    given: dict[str, Tensor] = {
        "seed": torch.tensor([7 + n for n in of]),
        "canvas_index": torch.zeros(batch, dtype=torch.int32),
        "step": changes.get("step", torch.ones(batch, dtype=torch.int32)),
    }
    found = on.vocabulary_statistics(**params)
    sampled = on.sample(**params, **softmax_statistics(found), **given, uniforms=uniforms)
    packed = automaton.pack_automata(automata, changes.get("closing_left"))
    statistics = automaton.make_class_statistics(batch, length, packed.most_classes)
    canvas = torch.zeros(batch, length, dtype=torch.int32) if canvas is None else canvas
    held = {"arena": packed.arena, "descriptor": packed.descriptor}
    on.class_statistics_(**params, **held, pinned=pinned, canvas=canvas, **statistics._asdict())
    out = {
        "argmax": found.argmax,
        "entropy": found.entropy,
        "chosen_class": torch.full((batch, length), -1, dtype=torch.int32),
        "remainder": torch.zeros(batch, length, dtype=torch.float64),
        "matches": torch.full((batch,), -1, dtype=torch.int32),
    }
    own = found.entropy.clone()
    on.constrain_(
        *held.values(),
        packed.most_states,
        packed.most_sets,
        *statistics,
        pinned=pinned,
        active=params["active"],
        state=torch.tensor(state, dtype=torch.int32),
        tokens_left=torch.tensor(tokens_left, dtype=torch.int32),
        max_steps=torch.full((batch,), 4, dtype=torch.int32),
        **given,
        uniforms=uniforms,
        **out,
    )
    drawing = {name: out[name] for name in ("chosen_class", "remainder", "matches")}
    on.sample_class_(**params, **held, pinned=pinned, **drawing, tokens=sampled)
    return {**out, "sampled": sampled, "own": own, **statistics._asdict()}
