"""One denoising step after the vocabulary head: statistics, sampling, acceptance, soft embedding.

The head's product, rounded to the model's dtype, is the raw logit a; everything is computed from it with
z = softcap * tanh(a / softcap) / temperature (softcap 0: z = a / temperature) in float32. The meaning is that of
transformers' generation_diffusion_gemma.py. Draws come from Philox4x32-10 with key = seed and counter = (canvas_index,
step, position, purpose), so they depend neither on the batch nor on the device; every drawing function also takes the
uniforms.

Shapes: logits [batch, length, vocabulary], float32 or bfloat16; what differs by request [batch]; what differs by
position [batch, length]. Ids, counters and bit masks are int32, seeds int64, flags bool, row_sum, uniforms, t_min and
t_max float64, the rest float32. Requests whose `active` is False are skipped: nothing of theirs is read or written.
`allowed` has one row of bits per set of allowed ids (`pack_allowed`), `allowed_row` names each position's row, -1 for
all ids; both or neither are given. Everything is contiguous and on one device.

Every function raises ValueError, naming the argument, what it got and what it wants. Values (a row index, a
temperature) are looked at on the CPU only: on a GPU that would wait for the device.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import dgemma_ext._C as _C
from dgemma_ext.ops.description import workspace_bytes
from dgemma_ext.ops.operators import operator

VOCABULARY_TILE = _C.VOCABULARY_TILE

_vocabulary_statistics = operator("vocabulary_statistics")
_vocabulary_statistics_out = operator("vocabulary_statistics.out")
_sample, _sample_out = operator("sample"), operator("sample.out")
_merge_shards, _merge_shards_out = operator("merge_vocabulary_shards"), operator("merge_vocabulary_shards.out")
_noise, _update_canvas = operator("noise_"), operator("update_canvas_")
_soft_embedding, _soft_embedding_out = operator("soft_embedding"), operator("soft_embedding.out")


class Purpose(enum.IntEnum):
    """What a draw is for; the last word of its counter."""

    INITIAL_NOISE = 0
    SAMPLE = 1
    RENOISE = 2


class CanvasStatus(enum.IntEnum):
    """What a request's canvas is doing, after an update."""

    RUNNING = 0
    STABLE = 1  # the draft has not changed for long enough and the mean entropy is below the threshold
    STEP_CAP = 2  # max_steps steps were made
    NON_FINITE = 3  # an entropy was not finite


class VocabularyStatistics(NamedTuple):
    """One pass over the logits; `tiles` is ceil(vocabulary / VOCABULARY_TILE)."""

    argmax: Tensor  # int32 [batch, length]: of the raw logit, the lowest index on ties
    entropy: Tensor  # float32 [batch, length], nats; NaN where an allowed logit is not finite
    row_max: Tensor  # float32 [batch, length]: max z
    row_sum: Tensor  # float64 [batch, length]: sum exp(z - row_max); NaN where the entropy is
    tile_max: Tensor  # float32 [batch, length, tiles]; -inf where nothing is allowed
    tile_sum: Tensor  # float32 [batch, length, tiles]: sum exp(z - tile_max)


class MergedShards(NamedTuple):
    """What `merge_vocabulary_shards` finds for every position, [batch, length] each."""

    argmax: Tensor  # int32, the id in the whole vocabulary
    entropy: Tensor  # float32, nats
    row_max: Tensor  # float32
    row_sum: Tensor  # float64
    share: Tensor  # float32: this shard's part of the mass
    owner: Tensor  # int32: the shard that the draw falls into
    own_uniform: Tensor  # float64: the uniform of the draw inside this shard, 0 where another is the owner


def vocabulary_statistics(
    logits: Tensor,
    softcap: float,
    temperature: Tensor,
    active: Tensor | None = None,
    allowed: Tensor | None = None,
    allowed_row: Tensor | None = None,
    *,
    out: VocabularyStatistics | None = None,
) -> VocabularyStatistics:
    """Argmax, entropy and softmax statistics of softmax(z) over the allowed ids of every position.

    Statistics are kept per tile of VOCABULARY_TILE ids; entropy is log s - t / s with s = sum exp(z - row_max) and
    t = sum exp(z - row_max)(z - row_max). Without `out`, what belongs to skipped requests is zero.
    """
    operands = (logits, softcap, temperature, active, allowed, allowed_row)
    if out is None:
        return VocabularyStatistics(*_vocabulary_statistics(*operands))
    argmax, entropy, row_max, row_sum, tile_max, tile_sum = out
    _vocabulary_statistics_out(
        *operands,
        argmax=argmax,
        entropy=entropy,
        row_max=row_max,
        row_sum=row_sum,
        tile_max=tile_max,
        tile_sum=tile_sum,
    )
    return out


def sample(
    logits: Tensor,
    softcap: float,
    temperature: Tensor,
    active: Tensor | None,
    allowed: Tensor | None,
    allowed_row: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    tile_max: Tensor,
    tile_sum: Tensor,
    seed: Tensor,
    canvas_index: Tensor,
    step: Tensor,
    uniforms: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """One token per position, int32 [batch, length], drawn from softmax(z) by inverse CDF.

    The softmax statistics are those of `vocabulary_statistics` for the same arguments. `uniforms`, float64 [batch,
    length] in [0, 1), take the place of the drawn ones. A row whose row_sum is NaN gives its lowest allowed id.
    """
    operands = (
        *(logits, softcap, temperature, active, allowed, allowed_row, row_max, row_sum, tile_max, tile_sum),
        *(seed, canvas_index, step, uniforms),
    )
    if out is None:
        result: Tensor = _sample(*operands)
        return result
    _sample_out(*operands, out=out)
    return out


def merge_vocabulary_shards(
    best: Tensor,
    argmax: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    rank: int,
    seed: Tensor,
    canvas_index: Tensor,
    step: Tensor,
    nonempty: Tensor | None = None,
    active: Tensor | None = None,
    uniforms: Tensor | None = None,
    *,
    out: MergedShards | None = None,
) -> MergedShards:
    """The statistics of a vocabulary of which each rank of tensor parallelism has a shard, and where a draw falls.

    The first five are `vocabulary_statistics` of each shard over its own ids, [shards, batch, length] in the order of
    the ids, with argmax as the id in the whole vocabulary and best the raw logit there, float32. nonempty, bool
    [shards, batch, length]: False where a shard has no id that the position may hold; nothing of it is read.

    The maximum is the greatest; sums, and shifted sums as entropies tell them, are brought to it. The draw is that of
    `sample`: `owner` is the shard that the uniform falls into, and a `sample` with `own_uniform` there gives the token.
    (A shard's masses are relative to its own maximum, so that a draw within rounding of a boundary, about 1e-7 of the
    mass, may fall on its other side.) `rank` is this process's shard. Without `out`, what belongs to skipped requests
    is zero.
    """
    operands = (best, argmax, entropy, row_max, row_sum, rank, seed, canvas_index, step, nonempty, active, uniforms)
    if out is None:
        return MergedShards(*_merge_shards(*operands))
    merged = {f"merged_{name}": getattr(out, name) for name in ("argmax", "entropy", "row_max", "row_sum")}
    _merge_shards_out(*operands, **merged, share=out.share, owner=out.owner, own_uniform=out.own_uniform)
    return out


def noise_(
    tokens: Tensor,
    vocabulary: int,
    purpose: int,
    seed: Tensor,
    canvas_index: Tensor,
    step: Tensor,
    active: Tensor | None = None,
    keep: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> None:
    """Writes uniform tokens of the vocabulary into `tokens`, int32 [batch, length], where `keep` is not set.

    A token is floor(u * vocabulary). `purpose` is a `Purpose`. Which tokens a position may hold does not matter here:
    the model takes noise from a few ids for text and is led astray by it.
    """
    draws = (seed, canvas_index, step, active, keep, uniforms)
    _noise(tokens, vocabulary, int(purpose), *draws)


def update_canvas_(
    sampled: Tensor,
    argmax: Tensor,
    entropy: Tensor,
    pinned: Tensor | None,
    uniforms: Tensor | None,
    vocabulary: int,
    seed: Tensor,
    canvas_index: Tensor,
    max_steps: Tensor,
    t_min: Tensor,
    t_max: Tensor,
    entropy_bound: Tensor,
    stability_threshold: Tensor,
    confidence_threshold: Tensor,
    active: Tensor,
    canvas: Tensor,
    draft: Tensor,
    stable_steps: Tensor,
    step: Tensor,
    temperature: Tensor,
    accepted: Tensor,
    mean_entropy: Tensor,
    status: Tensor,
) -> None:
    """Accepts, renoises and stops: the end of a denoising step. Everything from `active` on is written.

    A position is accepted when the entropies before it in (entropy, index) order sum to at most `entropy_bound`
    (EntropyBoundSampler); accepted positions take `sampled`, the others a fresh uniform token. `pinned` positions keep
    their token of `canvas`, stand in `draft`, and count nowhere. The canvas is stable when the draft equalled the one
    before it in each of the last `stability_threshold` steps and the mean entropy is below `confidence_threshold`
    (StableAndConfidentStoppingCriteria); it stops then, or after `max_steps` steps: `active` is cleared and `status` is
    a `CanvasStatus`. `step`, counted from 1, is advanced, and `temperature` becomes the next step's, t_min + (t_max -
    t_min) * steps left / max_steps (LinearTemperatureScheduleLogitsProcessor), rounded to float32 after every
    operation.

    `draft` is -1 before the first step and `stable_steps` 0. An entropy that is not finite gives the status
    NON_FINITE, no accepted position and a mean entropy of NaN, and leaves all else of the request but `active` alone.
    """
    _update_canvas(
        *(sampled, argmax, entropy, pinned, uniforms, vocabulary, seed, canvas_index, max_steps),
        *(t_min, t_max, entropy_bound, stability_threshold, confidence_threshold),
        *(active, canvas, draft, stable_steps, step, temperature, accepted, mean_entropy, status),
    )


def soft_embedding(
    logits: Tensor,
    softcap: float,
    temperature: Tensor,
    active: Tensor | None,
    allowed: Tensor | None,
    allowed_row: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    tile_max: Tensor,
    tile_sum: Tensor,
    pinned: Tensor | None,
    embedding: Tensor,
    embedding_scale: float,
    tolerance: float,
    max_embedding_norm: float,
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """The expected embedding under softmax of z rounded to the logits' dtype: the next step's self-conditioning.

    p = dtype(softmax(dtype(z))), result = dtype(dtype(p @ embedding) * dtype(embedding_scale)), [batch, length, hidden]
    in the logits' dtype, as modeling_diffusion_gemma.py computes it; `embedding` is [vocabulary, hidden] in that dtype.
    Pinned rows are zero. With `tolerance` > 0 a row may leave out entries whose mass times `max_embedding_norm` (the
    largest norm of a row of `embedding`) is within `tolerance` times the norm of the row's sum; a row for which that is
    not so is done densely, as all are with 0. Without `out`, rows of skipped requests are zero.
    """
    operands = (
        *(logits, softcap, temperature, active, allowed, allowed_row, row_max, row_sum, tile_max, tile_sum),
        *(pinned, embedding, embedding_scale, tolerance, max_embedding_norm),
    )
    if out is None:
        result: Tensor = _soft_embedding(*operands)
        return result
    _soft_embedding_out(*operands, out=out, workspace=workspace)
    return out


def soft_embedding_workspace(
    batch: int, length: int, vocabulary: int, hidden_size: int, device: torch.device | str = "cpu"
) -> int:
    """Bytes of workspace that `soft_embedding` needs for these sizes on this device."""
    return workspace_bytes(
        "soft_embedding",
        bfloat16=True,
        cuda=torch.device(device).type == "cuda",
        batch=batch,
        length=length,
        vocabulary=vocabulary,
        hidden_size=hidden_size,
    )


def pack_allowed(allowed_ids: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Bit rows for `allowed`, int32 [len(allowed_ids), ceil(vocabulary / 32)]: bit v % 32 of word v / 32 allows id v.

    Raises ValueError for an empty list of ids and for an id outside [0, vocabulary).
    """
    if not 1 <= vocabulary < 2**31:  # ids are int32
        raise ValueError(f"vocabulary: got {vocabulary}, wants 1 to {2**31 - 1}")
    words = (vocabulary + 31) // 32
    bits = torch.zeros(len(allowed_ids), words * 32, dtype=torch.bool, device="cpu")
    for row, ids in enumerate(allowed_ids):
        if len(ids) == 0:
            raise ValueError(f"allowed_ids[{row}]: got no id, wants at least one")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            outside = next(i for i in ids if not 0 <= i < vocabulary)
            raise ValueError(f"allowed_ids[{row}]: got id {outside}, wants 0 to {vocabulary - 1}")
        bits[row, torch.tensor(list(ids), device="cpu")] = True
    packed = np.packbits(bits.numpy(), axis=1, bitorder="little").view("<i4")
    return torch.from_numpy(packed.astype(np.int32, copy=False))
