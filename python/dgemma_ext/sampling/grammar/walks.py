"""Texts of a compiled grammar, as tokens: a shortest one, and random ones."""

from __future__ import annotations

import random

import numpy as np

from dgemma_ext.sampling.grammar.compiled import CompiledGrammar


class Walks:
    """Walks from a grammar's start to where its text may end."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._grammar = grammar
        self._ids = np.argsort(grammar.classes, kind="stable")  # the tokens, class by class
        self._begin = np.searchsorted(grammar.classes[self._ids], np.arange(grammar.num_classes + 1))

    def shortest(self) -> list[int]:
        """A text of the fewest tokens; of several the one with the lowest ids on the way."""
        state, tokens = self._grammar.start, list[int]()
        while self._grammar.distance[state]:
            token, state = min((int(self._tokens(arc).min()), self._target(arc)) for arc in self._nearer(state))
            tokens.append(token)
        return tokens

    def draw(self, rng: random.Random, wander: int = 40) -> list[int]:
        """A text whose first `wander` tokens are drawn from those that the grammar goes on with; the shortest way to
        its end follows. After each token it may end where the grammar lets it, once in ten times."""
        grammar, tokens = self._grammar, list[int]()
        state = grammar.start
        while True:
            arcs = [arc for arc in self._arcs(state) if self._target(arc) != grammar.end]
            if grammar.distance[state] == 0 and (len(tokens) >= wander or not arcs or rng.random() < 0.1):
                return tokens
            arc = rng.choice(self._nearer(state) if len(tokens) >= wander else arcs)
            tokens.append(int(rng.choice(self._tokens(arc))))
            state = self._target(arc)

    def _arcs(self, state: int) -> range:
        return range(self._grammar.out_begin[state], self._grammar.out_begin[state + 1])

    def _nearer(self, state: int) -> list[int]:
        distance = self._grammar.distance
        return [
            arc
            for arc in self._arcs(state)
            if self._target(arc) != self._grammar.end and distance[self._target(arc)] < distance[state]
        ]

    def _target(self, arc: int) -> int:
        return int(self._grammar.out_target[arc])

    def _tokens(self, arc: int) -> np.ndarray:
        of = self._grammar.out_set[arc]
        classes = self._grammar.set_class[self._grammar.set_begin[of] : self._grammar.set_begin[of + 1]]
        return np.concatenate([self._ids[self._begin[k] : self._begin[k + 1]] for k in classes])
