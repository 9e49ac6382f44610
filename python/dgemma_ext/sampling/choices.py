"""Scores of the texts of a dg.Choice, from the raw logits of the step that gave a canvas.

A text's score is the mass of all canvases that say it, in whichever tokens, with the answer's end and padding behind
it, under the product of the positions' distributions at temperature 1; scores sum to 1. With texts of one token each at
one place this is the model's probability of them. With longer ones it is not: the distributions of positions are those
of a mixture over all texts, and their product favours texts of fewer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dgemma_ext.sampling.canvas import Canvas
from dgemma_ext.sampling.grammar import Vocabulary
from dgemma_ext.sampling.logprobs import canvas_logprobs

# Spellings of a text: (begin, end) of its bytes → the tokens that are these bytes.
Spellings = dict[tuple[int, int], list[int]]


def choice_scores(
    texts: Mapping[str, bytes | None],
    vocabulary: Vocabulary,
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
    logits: raw, [L, vocabulary], of the canvas's positions from the answer's beginning on. content: the answer's pinned
    and allowed tokens, and first: the position of the answer that the first of these has. room: how many positions its
    text may take at most. pad_id: None: any token follows the end.
    """
    spellings = {choice: _spellings(text, vocabulary) for choice, text in texts.items() if text is not None}
    pads = [] if pad_id is None else [pad_id]
    ids = sorted(
        {token for one in spellings.values() for found in one.values() for token in found}.union(end_ids, pads)
    )
    logs = _log_probabilities(logits, softcap, ids, content, first)
    if pad_id is None:  # else every canvas has the same factor
        logs -= _allowed_mass(logits, softcap, content, first)[:, None]
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
    columns = {span: [column[token] for token in ids] for span, ids in spellings.items()}
    for position, row in enumerate(logs[:size], start=1):
        after = np.full(size + 1, -np.inf)
        for (begin, end), places in columns.items():
            if reached[begin] > -np.inf:
                one = reached[begin] + np.logaddexp.reduce(row[places])
                after[end] = np.logaddexp(after[end], one)
        reached = after
        mass = np.logaddexp(mass, reached[size] + closed[position])
    return float(mass)


def _log_probabilities(logits: Tensor, softcap: float, ids: Sequence[int], content: Canvas, first: int) -> np.ndarray:
    """float64 [L, ids]: of pinned positions those of their token alone, of others without what is not allowed."""
    nothing = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
    found = np.array(
        [one.top_logprobs for one in canvas_logprobs(logits, softcap, nothing, nothing.bool(), tuple(ids))],
        dtype=np.float64,
    ).reshape(len(logits), len(ids))
    given = np.array(ids)
    for row, position in enumerate(range(first, first + len(logits))):
        if content.pinned is not None and position < len(content.pinned) and content.pinned[position]:
            found[row] = np.where(given == content.tokens[position], 0.0, -np.inf)
            continue
        allowed = content.allowed_at(position)
        if allowed is not None:
            found[row][~np.isin(given, allowed)] = -np.inf
    return found


def _allowed_mass(logits: Tensor, softcap: float, content: Canvas, first: int) -> np.ndarray:
    """float64 [L]: the logarithm of what the allowed tokens hold of each position's distribution."""
    found = np.zeros(len(logits))
    for row, position in enumerate(range(first, first + len(logits))):
        allowed = content.allowed_at(position)
        is_pinned = content.pinned is not None and position < len(content.pinned) and content.pinned[position]
        if allowed is not None and not is_pinned:
            raw = logits[row].double()
            capped = softcap * torch.tanh(raw / softcap) if softcap else raw
            held = capped[torch.tensor(allowed, device=capped.device)].logsumexp(0)
            found[row] = float(held - capped.logsumexp(0))
    return found


def _spellings(text: bytes, vocabulary: Vocabulary) -> Spellings:
    found: Spellings = {}
    for begin, end in _spans(len(text)):
        ids = vocabulary.ids_of(text[begin:end])
        if ids:
            found[begin, end] = ids
    return found


def _spans(size: int) -> Iterator[tuple[int, int]]:
    return ((begin, end) for begin in range(size) for end in range(begin + 1, size + 1))
