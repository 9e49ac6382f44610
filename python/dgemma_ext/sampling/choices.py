"""Scores of the texts of a dg.Choice, from the raw logits of the step that gave a canvas.

A text's score is the mass of all canvases that say it, in whichever tokens, with the answer's end and padding behind
it, under the product of the positions' distributions at temperature 1; scores sum to 1. With texts of one token each at
one place this is the model's probability of them. With longer ones it is not: the distributions of positions are those
of a mixture over all texts, and their product favours texts of fewer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dgemma_ext.sampling.canvas import Canvas
from dgemma_ext.sampling.grammar import Vocabulary

# Spellings of a text: (begin, end) of its bytes → the tokens that are these bytes.
Spellings = dict[tuple[int, int], list[int]]


def choice_scores(
    texts: Mapping[str, bytes | None],
    spell: Callable[[bytes], Spellings],
    logits: Tensor,
    softcap: float,
    content: Canvas,
    first: int,
    room: int,
    end_ids: Sequence[int],
    pad_id: int | None,
) -> dict[str, float]:
    """Choice → its score, 0 for all where none of them has mass.

    texts: of each choice the bytes that stand in this canvas and later; None for one that the answer has left already.
    spell: gives the spellings of a text (`spellings_of`).
    logits: raw, [L, vocabulary], of the canvas's positions from the answer's beginning on. content: the answer's pinned
    and allowed tokens, and first: the position of the answer that the first of these has. room: how many positions its
    text may take at most. pad_id: None: any token follows the end.
    """
    spellings = {choice: spell(text) for choice, text in texts.items() if text is not None}
    pads = [] if pad_id is None else [pad_id]
    ids = sorted(
        {token for one in spellings.values() for found in one.values() for token in found}.union(end_ids, pads)
    )
    # With padding all canvases have a token of these at each position, so that its constant is that of all masses.
    logs = _logs(logits, softcap, ids, content, first, normalised=pad_id is None)
    column = {token: index for index, token in enumerate(ids)}
    length = len(logs)
    # The mass of an answer's end at each position, and of padding behind it; a text may also fill the canvas.
    padding = np.zeros(length + 1) if pad_id is None else np.append(np.cumsum(logs[::-1, column[pad_id]])[::-1], 0.0)
    ends = np.logaddexp.reduce(logs[:, [column[token] for token in end_ids]], axis=1) + padding[1:]
    closed = np.append(ends, 0.0)
    masses = {choice: -np.inf for choice in texts}
    for choice, found in spellings.items():
        size = len(texts[choice] or b"")
        masses[choice] = _mass(found, size, logs[:room], closed, column)
    total = np.logaddexp.reduce(list(masses.values()))
    return {choice: float(np.exp(mass - total)) if total > -np.inf else 0.0 for choice, mass in masses.items()}


def _mass(spellings: Spellings, size: int, logs: np.ndarray, closed: np.ndarray, column: Mapping[int, int]) -> float:
    """The logarithm of the mass of a text of `size` bytes in all its spellings. closed: that of an answer that ends
    after so many positions."""
    reached = np.full(size + 1, -np.inf)
    reached[0] = 0.0
    mass = closed[0] if size == 0 else -np.inf
    if not spellings:
        return float(mass)
    begins, ends = np.array(list(spellings)).T
    firsts = np.cumsum([0, *map(len, spellings.values())])[:-1]
    columns = [column[token] for ids in spellings.values() for token in ids]
    of_spans = np.logaddexp.reduceat(logs[:size, columns], firsts, axis=1)
    for position, of_span in enumerate(of_spans, start=1):
        after = np.full(size + 1, -np.inf)
        np.logaddexp.at(after, ends, reached[begins] + of_span)
        reached = after
        mass = np.logaddexp(mass, reached[size] + closed[position])
    return float(mass)


def _logs(
    logits: Tensor, softcap: float, ids: Sequence[int], content: Canvas, first: int, normalised: bool
) -> np.ndarray:
    """float64 [L, ids]: log-probabilities given the pinned and allowed tokens; not normalised, they lack a constant of
    each position."""
    found = _capped(logits[:, torch.tensor(ids, device=logits.device)], softcap).cpu().numpy()
    given = np.array(ids)
    for row, position in enumerate(range(first, first + len(logits))):
        if content.pinned is not None and position < len(content.pinned) and content.pinned[position]:
            found[row] = np.where(given == content.tokens[position], 0.0, -np.inf)
            continue
        allowed = content.allowed_at(position)
        if normalised:
            held = logits[row] if allowed is None else logits[row][torch.tensor(allowed, device=logits.device)]
            found[row] -= float(_capped(held, softcap).logsumexp(0))
        if allowed is not None:
            found[row][~np.isin(given, allowed)] = -np.inf
    return found


def _capped(logits: Tensor, softcap: float) -> Tensor:
    raw = logits.double()
    return softcap * torch.tanh(raw / softcap) if softcap else raw


def spellings_of(text: bytes, vocabulary: Vocabulary) -> Spellings:
    """The tokens of each piece of a text."""
    found: Spellings = {}
    for begin in range(len(text)):
        for end in range(begin + 1, len(text) + 1):
            piece = text[begin:end]
            if not vocabulary.begins_some(piece):
                break
            ids = vocabulary.ids_of(piece)
            if ids:
                found[begin, end] = ids
    return found
