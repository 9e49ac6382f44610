"""The vocabulary of a rank of tensor parallelism, and a denoising step after the last layer over it.

vLLM gives each rank a range of the embedding's rows. A rank computes its own logits and their statistics; what a row
needs of the other ranks are six numbers (ops.denoise.merge_vocabulary_shards), the token that the rank of its draw has
chosen, and a sum of soft embeddings. No rank has the logits of the whole vocabulary, and all ranks come to the same
canvases.

The soft embedding of a shard is normalized by the shard's own mass, and weighed by the mass's share. In fp32 the sum is
that of one rank up to rounding. In bf16 each rank rounds its part, and the shares are of logits that are not rounded,
where one rank rounds them before the softmax as transformers does: its tokens part from those of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dgemma_ext.integrations.vllm.slots import Rows
from dgemma_ext.ops import denoise
from dgemma_ext.ops.denoise import MergedShards, VocabularyStatistics
from dgemma_ext.ops.vocabulary_head import statistics_layout, vocabulary_head
from dgemma_ext.sampling.constraint import ConstraintRows
from dgemma_ext.sampling.step import LogitsParams, constrain, softmax_statistics

# A shard with less of the mass than this adds nothing to a soft embedding: half a unit in the last place of fp32.
_LEAST_SHARE = 2.0**-25


class Ranks(Protocol):
    """The ranks that share a vocabulary."""

    rank: int
    count: int

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, [count, ...]."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Their sum."""


@dataclass(frozen=True)
class Vocabulary:
    """size: of the whole. embedding: this rank's rows, [size of the shard, hidden], the first of them id `begin`.

    tolerance, max_norm: of ops.denoise.soft_embedding. ranks: None where this rank has all.
    """

    size: int
    begin: int
    embedding: Tensor
    softcap: float
    embedding_scale: float
    tolerance: float
    max_norm: float
    ranks: Ranks | None = None

    @property
    def own(self) -> int:
        """How many ids are this rank's."""
        return self.embedding.shape[0]


class Buffers:
    """Temporary buffers of a step over up to `rows` canvases of `length` positions."""

    def __init__(self, vocabulary: Vocabulary, rows: int, length: int) -> None:
        embedding = vocabulary.embedding
        hidden, device = embedding.shape[1], embedding.device
        self.rows = rows
        self.logits = torch.empty(rows, length, vocabulary.own, dtype=embedding.dtype, device=device)
        layout = statistics_layout(rows, length, vocabulary.own)
        self.statistics = VocabularyStatistics(
            *(torch.zeros(shape, dtype=kind, device=device) for shape, kind in layout)
        )
        self.sampled = torch.zeros(rows, length, dtype=torch.int32, device=device)
        self.accepted = torch.zeros(rows, length, dtype=torch.bool, device=device)
        size = denoise.soft_embedding_workspace(rows, length, vocabulary.own, hidden, device)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=device)

    @staticmethod
    def bytes_of_a_row(vocabulary: Vocabulary, length: int) -> int:
        """The bytes of a canvas's logits."""
        return length * vocabulary.own * vocabulary.embedding.element_size()

    def first(self, rows: int) -> tuple[Tensor, VocabularyStatistics, Tensor]:
        """Views of the first rows: logits, statistics, sampled."""
        statistics = VocabularyStatistics(*(tensor[:rows] for tensor in self.statistics))
        return self.logits[:rows], statistics, self.sampled[:rows]


class AllowedOfShard:
    """This rank's part of the masks of allowed ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._of: tuple[int, Tensor, Tensor] | None = None

    def __call__(self, allowed: Tensor, version: int) -> tuple[Tensor, Tensor]:
        """The masks of the rank's ids, and which of them have any, bool [masks]; a mask that has none allows the first,
        so that it can be computed and left aside. version: of `allowed`."""
        if self._of is None or self._of[0] != version:
            own = _bits_between(allowed, self._vocabulary.begin, self._vocabulary.own)
            some = (own != 0).any(-1)
            own[:, 0] = torch.where(some, own[:, 0], 1)
            self._of = version, own, some
        return self._of[1], self._of[2]


def _bits_between(masks: Tensor, begin: int, count: int) -> Tensor:
    """Bits [begin, begin + count) of the masks, int32 [masks, words], as masks from bit 0 on."""
    words = -(-count // 32)
    first, shift = divmod(begin, 32)
    wide = masks[:, first : first + words + 1].to(torch.int64) & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, words + 1 - wide.shape[1]))
    own = wide[:, :-1] >> shift | wide[:, 1:] << 32 - shift & 0xFFFFFFFF
    if count % 32:
        own[:, -1] &= (1 << count % 32) - 1
    return torch.where(own >= 2**31, own - 2**32, own).to(torch.int32)  # the same 32 bits


def advance(
    vocabulary: Vocabulary,
    buffers: Buffers,
    hidden: Tensor,
    rows: Rows,
    pinned: Tensor,
    soft: Tensor,
    allowed: tuple[Tensor, Tensor] | None = None,
    nonempty: Tensor | None = None,
    constraints: ConstraintRows | None = None,
) -> None:
    """A denoising step of the active rows, from the normalized output of the last layer [n, L, hidden], in place.

    pinned: bool [n, L]. soft: [n, L, hidden], gets the next step's soft embeddings; those of rows that are not active
    stay. allowed: the masks over this rank's ids and each position's row, int32 [n, L]; nonempty: bool [masks], which
    masks have an id of this rank, None where it has all. constraints: of the rows' grammars.
    """
    logits, statistics, sampled = buffers.first(rows.canvas.shape[0])
    mask, allowed_row = (None, None) if allowed is None else allowed
    params: Any = {
        "softcap": vocabulary.softcap,
        "temperature": rows.temperature.clone(),  # the update overwrites it with the next step's
        "active": rows.active,
        "allowed": mask,
        "allowed_row": allowed_row,
    }
    vocabulary_head(hidden, vocabulary.embedding, **params, logits=logits, out=statistics)
    merged = None
    if vocabulary.ranks is None:
        draws: Any = {"seed": rows.seed, "canvas_index": rows.canvas_index, "step": rows.step}
        denoise.sample(logits, **params, **softmax_statistics(statistics), **draws, out=sampled)
        argmax, entropy = statistics.argmax, statistics.entropy
    else:
        present = None if nonempty is None or allowed_row is None else _present(nonempty, allowed_row)
        merged = _merge(vocabulary, logits, statistics, rows, present)
        _sample_by_owner(vocabulary, vocabulary.ranks, logits, statistics, params, rows, merged, sampled)
        argmax, entropy = merged.argmax, merged.entropy
    if constraints is not None:
        state: Any = _Constrained(rows, pinned, entropy)
        constrain(constraints, logits, params, state, None, argmax, sampled)
    _update(vocabulary, buffers, rows, pinned, sampled, argmax, entropy)
    _soften(vocabulary, buffers, logits, statistics, params, rows, pinned, soft, merged)


def _present(nonempty: Tensor, allowed_row: Tensor) -> Tensor:
    """Which positions may hold an id of this rank, bool [n, L]."""
    return (allowed_row < 0) | nonempty[allowed_row.clamp(min=0).to(torch.int64)]


def _merge(
    vocabulary: Vocabulary, logits: Tensor, own: VocabularyStatistics, rows: Rows, present: Tensor | None
) -> MergedShards:
    """The statistics of the whole vocabulary, of those that the ranks have."""
    ranks = vocabulary.ranks
    assert ranks is not None
    best = logits.gather(-1, own.argmax.to(torch.int64)[..., None])[..., 0]
    values = (best, own.argmax + vocabulary.begin, own.entropy, own.row_max, own.row_sum)
    # float64 holds each of them exactly, and one gather is faster than six.
    told = torch.stack([value.to(torch.float64) for value in values], dim=-1)
    if present is not None:
        told = torch.cat([told, present[..., None].to(torch.float64)], dim=-1)
    of_ranks = ranks.gather(told)

    def column(index: int, dtype: torch.dtype) -> Tensor:
        return of_ranks[..., index].to(dtype).contiguous()

    return denoise.merge_vocabulary_shards(
        column(0, torch.float32),
        column(1, torch.int32),
        column(2, torch.float32),
        column(3, torch.float32),
        column(4, torch.float64),
        ranks.rank,
        rows.seed,
        rows.canvas_index,
        rows.step,
        nonempty=None if present is None else column(5, torch.bool),
        active=rows.active,
    )


def _sample_by_owner(
    vocabulary: Vocabulary,
    ranks: Ranks,
    logits: Tensor,
    own: VocabularyStatistics,
    params: Any,
    rows: Rows,
    merged: MergedShards,
    sampled: Tensor,
) -> None:
    draws: Any = {"seed": rows.seed, "canvas_index": rows.canvas_index, "step": rows.step}
    denoise.sample(logits, **params, **softmax_statistics(own), **draws, uniforms=merged.own_uniform, out=sampled)
    of_ranks = ranks.gather(sampled + vocabulary.begin)
    chosen = of_ranks.gather(0, merged.owner.to(torch.int64)[None])[0]
    sampled.copy_(chosen.clamp(max=vocabulary.size - 1))


def _update(
    vocabulary: Vocabulary,
    buffers: Buffers,
    rows: Rows,
    pinned: Tensor,
    sampled: Tensor,
    argmax: Tensor,
    entropy: Tensor,
) -> None:
    denoise.update_canvas_(
        sampled,
        argmax,
        entropy,
        pinned=pinned,
        uniforms=None,
        vocabulary=vocabulary.size,
        seed=rows.seed,
        canvas_index=rows.canvas_index,
        max_steps=rows.max_steps,
        t_min=rows.t_min,
        t_max=rows.t_max,
        entropy_bound=rows.entropy_bound,
        stability_threshold=rows.stability_threshold,
        confidence_threshold=rows.confidence_threshold,
        active=rows.active,
        canvas=rows.canvas,
        draft=rows.draft,
        stable_steps=rows.stable_steps,
        step=rows.step,
        temperature=rows.temperature,
        accepted=buffers.accepted[: rows.canvas.shape[0]],
        mean_entropy=rows.mean_entropy,
        status=rows.status,
    )


def _soften(
    vocabulary: Vocabulary,
    buffers: Buffers,
    logits: Tensor,
    own: VocabularyStatistics,
    params: LogitsParams,
    rows: Rows,
    pinned: Tensor,
    soft: Tensor,
    merged: MergedShards | None,
) -> None:
    """The next step's soft embedding of the rows that are still active."""

    def embed(pinned: Tensor, scale: float, out: Tensor) -> None:
        denoise.soft_embedding(
            logits,
            **params,
            **softmax_statistics(own),
            pinned=pinned,
            embedding=vocabulary.embedding,
            embedding_scale=scale,
            tolerance=vocabulary.tolerance,
            max_embedding_norm=vocabulary.max_norm,
            out=out,
            workspace=buffers.workspace,
        )

    if merged is None or vocabulary.ranks is None:
        embed(pinned, vocabulary.embedding_scale, soft)
        return
    part = torch.zeros_like(soft)
    embed(pinned | (merged.share < _LEAST_SHARE), 1.0, part)  # a mask without an id of this rank has no share
    whole = vocabulary.ranks.sum(part.to(torch.float32) * merged.share[..., None]).to(soft.dtype)
    scale = torch.tensor(vocabulary.embedding_scale, dtype=soft.dtype, device=soft.device)
    soft.copy_(torch.where(rows.active[:, None, None], whole * scale, soft))


class _Constrained:
    """What `constrain` reads and writes of a batch's state."""

    def __init__(self, rows: Rows, pinned: Tensor, entropy: Tensor) -> None:
        self.pinned, self.entropy = pinned, entropy
        self.canvas, self.active = rows.canvas, rows.active
        self.max_steps, self.seed, self.canvas_index, self.step = (
            rows.max_steps,
            rows.seed,
            rows.canvas_index,
            rows.step,
        )
        self.matches, self.status = rows.matches, rows.status
