"""The vocabulary head with the statistics of its logits, which a GPU makes while the product is still at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma_ext.ops.denoise import VOCABULARY_TILE, VocabularyStatistics
from dgemma_ext.ops.operators import operator

_vocabulary_head = operator("vocabulary_head")


def vocabulary_head(
    hidden: Tensor,
    embedding: Tensor,
    softcap: float,
    temperature: Tensor,
    active: Tensor | None = None,
    allowed: Tensor | None = None,
    allowed_row: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    out: VocabularyStatistics | None = None,
) -> tuple[Tensor, VocabularyStatistics]:
    """Raw logits hidden @ embedding.T, stored once in the tensors' dtype, and `vocabulary_statistics` of them.

    Args:
        hidden: [batch, length, hidden_size], the normalised output of the last layer, float32 or bfloat16.
        embedding: [vocabulary, hidden_size], dtype of hidden.
        softcap, temperature, active, allowed, allowed_row: as `vocabulary_statistics` takes them.
        logits: where to store the raw logits, [batch, length, vocabulary]; allocated when None.
        out: where to store the statistics; what belongs to requests that are not active stays as it is there.

    Returns:
        The raw logits and their statistics.

    Raises:
        ValueError: an argument has another dtype, shape, layout or device; the message names it.
    """
    if logits is None:
        logits = hidden.new_empty((*hidden.shape[:-1], embedding.shape[0]))
    if out is None:
        # Zero where a request is not active.
        layout = _layout(tuple(hidden.shape[:-1]), embedding.shape[0])
        out = VocabularyStatistics(*(hidden.new_zeros(shape, dtype=dtype) for shape, dtype in layout))
    _vocabulary_head(hidden, embedding, softcap, temperature, active, allowed, allowed_row, logits, *out)
    return logits, out


def statistics_layout(batch: int, length: int, vocabulary: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of VocabularyStatistics, field by field."""
    return _layout((batch, length), vocabulary)


def _layout(positions: tuple[int, ...], vocabulary: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    tiles = (*positions, -(-vocabulary // VOCABULARY_TILE))
    of_positions = [(positions, dtype) for dtype in (torch.int32, torch.float32, torch.float32, torch.float64)]
    return [*of_positions, (tiles, torch.float32), (tiles, torch.float32)]
