"""Canvases that an automaton accepts, in float64 by enumeration: what csrc/include/dgemma/automaton.h says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Arcs = dict[tuple[int, int], int]  # (state, token) → state


@dataclass
class Conditioned:
    """Of the canvases that are accepted."""

    words: np.ndarray  # int [words, L]
    probability: np.ndarray  # [words], given acceptance
    marginals: np.ndarray  # [L, V]
    entropy: np.ndarray  # [L]
    log_mass: float  # of all accepted, with softmaxes of the rows


def conditioned(
    z: np.ndarray, arcs: Arcs, start: int, ends: set[int], passes: Callable[[int, int], bool] = lambda i, q: True
) -> Conditioned | None:
    """z: float64 [L, V]. None where no canvas is accepted. Probabilities are relative to the greatest.

    passes(i, state): whether a canvas may be in a state after i tokens.
    """
    length, vocabulary = z.shape
    logs = z - z.max(1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
    words, scores = [], []
    for word in itertools.product(range(vocabulary), repeat=length):
        state: int | None = start if passes(0, start) else None
        for i, token in enumerate(word, start=1):
            state = arcs.get((state, token)) if state is not None else None
            state = state if state is not None and passes(i, state) else None
        score = sum(logs[i, token] for i, token in enumerate(word))
        if state in ends and score > -np.inf:
            words.append(word)
            scores.append(score)
    if not words:
        return None
    log = np.array(scores)
    p = np.exp(log - log.max())
    mass = p.sum()
    p = p / mass
    found = np.array(words)
    marginals = np.zeros_like(z)
    for i in range(length):
        np.add.at(marginals[i], found[:, i], p)
    entropy = -np.where(marginals > 0, marginals * np.log(np.where(marginals > 0, marginals, 1)), 0).sum(1)
    return Conditioned(found, p, marginals, entropy, float(log.max() + np.log(mass)))


def drawn(
    given: Conditioned, uniforms: np.ndarray, class_order: list[list[list[int]]], arcs: Arcs, start: int
) -> list[int]:
    """The joint draw by uniforms: at every position the first token, in the order of the state's classes, at which the
    cumulative conditional probability exceeds its uniform. class_order[state]: the tokens of each class."""
    tokens: list[int] = []
    state = start
    for i, uniform in enumerate(uniforms):
        keep = np.all(given.words[:, :i] == np.array(tokens, dtype=int), axis=1)
        total = given.probability[keep].sum()
        order = [token for tokens_of_class in class_order[state] for token in tokens_of_class]
        mass = [given.probability[keep & (given.words[:, i] == token)].sum() / total for token in order]
        cumulative = np.cumsum(mass)
        index = int(np.searchsorted(cumulative, uniform, side="right"))
        index = min(index, max(n for n, one in enumerate(mass) if one > 0))
        tokens.append(order[index])
        state = arcs[(state, tokens[-1])]
    return tokens
