"""The vocabulary head with the statistics of its logits, which a GPU makes while the product is still at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from dgemma_ext.ops import plain
from dgemma_ext.ops.denoise import VOCABULARY_TILE, VocabularyStatistics, vocabulary_statistics


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
    for name, tensor, dimensions in (("hidden", hidden, 3), ("embedding", embedding, 2)):
        if tensor.dim() != dimensions or not tensor.is_contiguous():
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, wants {dimensions} contiguous dimensions")
    if embedding.shape[1] != hidden.shape[2] or embedding.dtype != hidden.dtype:
        wanted = f"[any, {hidden.shape[2]}] of {hidden.dtype}"
        raise ValueError(f"embedding: got {list(embedding.shape)} of {embedding.dtype}, wants {wanted}")
    batch, length, vocabulary = *hidden.shape[:2], embedding.shape[0]
    if logits is None:
        logits = hidden.new_empty((batch, length, vocabulary))
    if tuple(logits.shape) != (batch, length, vocabulary) or logits.dtype != hidden.dtype:
        wanted = f"{[batch, length, vocabulary]} of {hidden.dtype}"
        raise ValueError(f"logits: got {list(logits.shape)} of {logits.dtype}, wants {wanted}")
    layout = statistics_layout(batch, length, vocabulary)
    if out is None:
        # Zero where a request is not active.
        out = VocabularyStatistics(*(hidden.new_zeros(shape, dtype=dtype) for shape, dtype in layout))
    for name, tensor, (shape, dtype) in zip(VocabularyStatistics._fields, out, layout, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"out.{name}: got {list(tensor.shape)} of {tensor.dtype}, wants {list(shape)} of {dtype}")
    reading = (softcap, temperature, active, allowed, allowed_row)
    torch.ops.dgemma.vocabulary_head(hidden, embedding, *reading, logits, *out)
    return logits, out


def statistics_layout(batch: int, length: int, vocabulary: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of VocabularyStatistics, field by field."""
    positions: tuple[int, ...] = (batch, length)
    tiles = (*positions, -(-vocabulary // VOCABULARY_TILE))
    of_positions = [(positions, dtype) for dtype in (torch.int32, torch.float32, torch.float32, torch.float64)]
    return [*of_positions, (tiles, torch.float32), (tiles, torch.float32)]


def _plain(hidden: Tensor, embedding: Tensor, *operands: Any) -> None:
    """torch's product, request by request so that a batch changes no bits, and the statistics of what it stored."""
    softcap, temperature, active, allowed, allowed_row, logits, *statistics = operands
    for request in range(hidden.shape[0]):
        if active is None or bool(active[request]):
            torch.mm(hidden[request], embedding.t(), out=logits[request])
    out = VocabularyStatistics(*statistics)
    vocabulary_statistics(logits, softcap, temperature, active, allowed, allowed_row, out=out)


plain.register("dgemma::vocabulary_head", _plain)


@library.register_fake("dgemma::vocabulary_head")
def _vocabulary_head_fake(*_: object) -> None:
    return None
