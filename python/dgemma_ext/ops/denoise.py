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
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from dgemma_ext import _C
from dgemma_ext.ops.plain import denoise as denoise_plain

__all__ = [
    "VOCABULARY_TILE",
    "CanvasStatus",
    "Purpose",
    "VocabularyStatistics",
    "noise_",
    "pack_allowed",
    "sample",
    "soft_embedding",
    "soft_embedding_workspace",
    "update_canvas_",
    "vocabulary_statistics",
]

VOCABULARY_TILE = denoise_plain.VOCABULARY_TILE
_MAX_VOCABULARY = 2**31 - 1  # ids are int32


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
    """Argmax, entropy and masses of the distribution softmax(z) over the allowed ids of every position.

    Masses are kept per tile of VOCABULARY_TILE ids; entropy is log s - t / s with s = sum exp(z - row_max) and
    t = sum exp(z - row_max)(z - row_max). Without `out`, what belongs to skipped requests is zero.
    """
    reading = (logits, softcap, temperature, active, allowed, allowed_row)
    _check_logits(*reading)
    if out is None:
        return VocabularyStatistics(*_called(torch.ops.dgemma.vocabulary_statistics, *reading))
    positions = tuple(logits.shape[:2])
    _check("argmax", out.argmax, torch.int32, positions, logits)
    _check("entropy", out.entropy, torch.float32, positions, logits)
    _check_masses(logits, out.row_max, out.row_sum, out.tile_max, out.tile_sum)
    _called(torch.ops.dgemma.vocabulary_statistics.out, *reading, **out._asdict())
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

    The masses are those of `vocabulary_statistics` for the same arguments. `uniforms`, float64 [batch, length] in
    [0, 1), take the place of the drawn ones. A row whose row_sum is NaN gives its lowest allowed id.
    """
    reading = (logits, softcap, temperature, active, allowed, allowed_row)
    _check_logits(*reading)
    masses = (row_max, row_sum, tile_max, tile_sum)
    _check_masses(logits, *masses)
    batch, length, _ = logits.shape
    _check_draws(logits, batch, length, seed, canvas_index, step, uniforms)
    operands = (*reading, *masses, seed, canvas_index, step, uniforms)
    if out is None:
        result: Tensor = _called(torch.ops.dgemma.sample, *operands)
        return result
    _check("out", out, torch.int32, (batch, length), logits)
    _called(torch.ops.dgemma.sample.out, *operands, out=out)
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
    allowed: Tensor | None = None,
    allowed_row: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> None:
    """Writes uniform tokens among the allowed into `tokens`, int32 [batch, length], where `keep` is not set.

    A token is number floor(u * count) of the allowed ids in increasing order. `purpose` is a `Purpose`.
    """
    _check_dimensions("tokens", tokens, 2)
    batch, length = tokens.shape
    _check("tokens", tokens, torch.int32, (batch, length), tokens)
    _check_vocabulary(vocabulary)
    if purpose not in list(Purpose):
        raise ValueError(f"purpose: got {purpose}, wants {[int(p) for p in Purpose]}")
    _check_draws(tokens, batch, length, seed, canvas_index, step, uniforms)
    _check_optional("active", active, torch.bool, (batch,), tokens)
    _check_optional("keep", keep, torch.bool, (batch, length), tokens)
    _check_allowed(tokens, vocabulary, (batch, length), allowed, allowed_row)
    operands = (seed, canvas_index, step, active, keep, allowed, allowed_row, uniforms)
    _called(torch.ops.dgemma.noise_, tokens, vocabulary, int(purpose), *operands)


def update_canvas_(
    sampled: Tensor,
    argmax: Tensor,
    entropy: Tensor,
    pinned: Tensor | None,
    allowed: Tensor | None,
    allowed_row: Tensor | None,
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
    (EntropyBoundSampler); accepted positions take `sampled`, the others a fresh uniform allowed token. `pinned`
    positions keep their token of `canvas`, stand in `draft`, and count nowhere. The canvas is stable when the draft
    equalled the one before it in each of the last `stability_threshold` steps and the mean entropy is below
    `confidence_threshold` (StableAndConfidentStoppingCriteria); it stops then, or after `max_steps` steps: `active` is
    cleared and `status` is a `CanvasStatus`. `step`, counted from 1, is advanced, and `temperature` becomes the next
    step's, t_min + (t_max - t_min) * steps left / max_steps (LinearTemperatureScheduleLogitsProcessor), rounded to
    float32 after every operation.

    `draft` is -1 before the first step and `stable_steps` 0. An entropy that is not finite gives the status
    NON_FINITE, no accepted position and a mean entropy of NaN, and leaves all else of the request but `active` alone.
    """
    _check_dimensions("sampled", sampled, 2)
    batch, length = sampled.shape
    positions = (batch, length)
    _check_vocabulary(vocabulary)
    for name, tensor, dtype in (
        ("sampled", sampled, torch.int32),
        ("argmax", argmax, torch.int32),
        ("entropy", entropy, torch.float32),
        ("canvas", canvas, torch.int32),
        ("draft", draft, torch.int32),
        ("accepted", accepted, torch.bool),
    ):
        _check(name, tensor, dtype, positions, sampled)
    for name, tensor, dtype in (
        ("max_steps", max_steps, torch.int32),
        ("t_min", t_min, torch.float64),
        ("t_max", t_max, torch.float64),
        ("entropy_bound", entropy_bound, torch.float32),
        ("stability_threshold", stability_threshold, torch.int32),
        ("confidence_threshold", confidence_threshold, torch.float32),
        ("active", active, torch.bool),
        ("stable_steps", stable_steps, torch.int32),
        ("temperature", temperature, torch.float32),
        ("mean_entropy", mean_entropy, torch.float32),
        ("status", status, torch.int32),
    ):
        _check(name, tensor, dtype, (batch,), sampled)
    _check_optional("pinned", pinned, torch.bool, positions, sampled)
    _check_draws(sampled, batch, length, seed, canvas_index, step, uniforms)
    _check_allowed(sampled, vocabulary, positions, allowed, allowed_row)
    _called(
        torch.ops.dgemma.update_canvas_,
        *(sampled, argmax, entropy, pinned, allowed, allowed_row, uniforms, vocabulary, seed, canvas_index, max_steps),
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
    reading = (logits, softcap, temperature, active, allowed, allowed_row)
    _check_logits(*reading)
    masses = (row_max, row_sum, tile_max, tile_sum)
    _check_masses(logits, *masses)
    batch, length, vocabulary = logits.shape
    _check_optional("pinned", pinned, torch.bool, (batch, length), logits)
    _check_dimensions("embedding", embedding, 2)
    hidden = embedding.shape[1]
    _check("embedding", embedding, logits.dtype, (vocabulary, hidden), logits)
    operands = (*reading, *masses, pinned, embedding, embedding_scale, tolerance, max_embedding_norm)
    if out is None:
        result: Tensor = _called(torch.ops.dgemma.soft_embedding, *operands)
        return result
    _check("out", out, logits.dtype, (batch, length, hidden), logits)
    size = soft_embedding_workspace(batch, length, vocabulary, hidden, logits.device)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.uint8, device=logits.device)
    _check("workspace", workspace, torch.uint8, (workspace.numel(),), logits)
    if workspace.numel() < size:
        raise ValueError(f"workspace: got {workspace.numel()} bytes, wants {size}")
    _called(torch.ops.dgemma.soft_embedding.out, *operands, out=out, workspace=workspace)
    return out


def soft_embedding_workspace(
    batch: int, length: int, vocabulary: int, hidden_size: int, device: torch.device | str = "cpu"
) -> int:
    """Bytes of workspace that `soft_embedding` needs for these sizes on this device."""
    cuda = torch.device(device).type == "cuda"
    return _C.soft_embedding_workspace(batch, length, vocabulary, hidden_size, cuda)


def pack_allowed(allowed_ids: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Bit rows for `allowed`, int32 [len(allowed_ids), ceil(vocabulary / 32)]: bit v % 32 of word v / 32 allows id v.

    Raises ValueError for an empty list of ids and for an id outside [0, vocabulary).
    """
    _check_vocabulary(vocabulary)
    words = (vocabulary + 31) // 32
    bits = torch.zeros(len(allowed_ids), words * 32, dtype=torch.bool)
    for row, ids in enumerate(allowed_ids):
        if len(ids) == 0:
            raise ValueError(f"allowed_ids[{row}]: got no id, wants at least one")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            outside = next(i for i in ids if not 0 <= i < vocabulary)
            raise ValueError(f"allowed_ids[{row}]: got id {outside}, wants 0 to {vocabulary - 1}")
        bits[row, torch.tensor(list(ids))] = True
    powers = torch.ones(32, dtype=torch.int64) << torch.arange(32)
    packed = torch.zeros(len(allowed_ids), words, dtype=torch.int64)
    for bit in range(32):
        packed += bits.view(len(allowed_ids), words, 32)[:, :, bit] * powers[bit]
    # Bit 31 is the sign of an int32.
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: got {tensor.dtype}, wants {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, wants {list(shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, wants one on {like.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {list(tensor.stride())}, wants a contiguous tensor")


def _check_optional(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor is not None:
        _check(name, tensor, dtype, shape, like)


def _check_dimensions(name: str, tensor: Tensor, dimensions: int) -> None:
    if tensor.dim() != dimensions:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, wants {dimensions} dimensions")


def _check_vocabulary(vocabulary: int) -> None:
    if not 1 <= vocabulary <= _MAX_VOCABULARY:
        raise ValueError(f"vocabulary: got {vocabulary}, wants 1 to {_MAX_VOCABULARY}")


def _check_logits(
    logits: Tensor,
    softcap: float,
    temperature: Tensor,
    active: Tensor | None,
    allowed: Tensor | None,
    allowed_row: Tensor | None,
) -> None:
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits: got {logits.dtype}, wants torch.float32 or torch.bfloat16")
    _check_dimensions("logits", logits, 3)
    batch, length, vocabulary = logits.shape
    _check_vocabulary(vocabulary)
    _check("logits", logits, logits.dtype, (batch, length, vocabulary), logits)
    _check("temperature", temperature, torch.float32, (batch,), logits)
    _check_optional("active", active, torch.bool, (batch,), logits)
    _check_allowed(logits, vocabulary, (batch, length), allowed, allowed_row)


def _check_allowed(
    like: Tensor, vocabulary: int, positions: tuple[int, int], allowed: Tensor | None, allowed_row: Tensor | None
) -> None:
    if allowed is None and allowed_row is None:
        return
    if allowed is None or allowed_row is None:
        missing = "allowed" if allowed is None else "allowed_row"
        raise ValueError(f"{missing}: got None, wants both allowed and allowed_row or neither")
    _check_dimensions("allowed", allowed, 2)
    _check("allowed", allowed, torch.int32, (allowed.shape[0], (vocabulary + 31) // 32), like)
    _check("allowed_row", allowed_row, torch.int32, positions, like)


def _check_masses(logits: Tensor, row_max: Tensor, row_sum: Tensor, tile_max: Tensor, tile_sum: Tensor) -> None:
    batch, length, vocabulary = logits.shape
    tiles = -(-vocabulary // VOCABULARY_TILE)
    _check("row_max", row_max, torch.float32, (batch, length), logits)
    _check("row_sum", row_sum, torch.float64, (batch, length), logits)
    _check("tile_max", tile_max, torch.float32, (batch, length, tiles), logits)
    _check("tile_sum", tile_sum, torch.float32, (batch, length, tiles), logits)


def _check_draws(
    like: Tensor, batch: int, length: int, seed: Tensor, canvas_index: Tensor, step: Tensor, uniforms: Tensor | None
) -> None:
    _check("seed", seed, torch.int64, (batch,), like)
    _check("canvas_index", canvas_index, torch.int32, (batch,), like)
    _check("step", step, torch.int32, (batch,), like)
    _check_optional("uniforms", uniforms, torch.float64, (batch, length), like)


def _called(op: Any, *arguments: Any, **keywords: Any) -> Any:
    """Calls the op; what the kernel's own checks say about an argument's values becomes a ValueError."""
    try:
        return op(*arguments, **keywords)
    except (RuntimeError, ValueError) as error:
        _, found, message = str(error).partition("dgemma::")
        if not found:
            raise
        raise ValueError(message.partition(": ")[2].splitlines()[0]) from error


@library.register_fake("dgemma::vocabulary_statistics")
def _vocabulary_statistics_fake(logits: Tensor, *_: object) -> tuple[Tensor, ...]:
    batch, length, vocabulary = logits.shape
    tiles = -(-vocabulary // VOCABULARY_TILE)
    return (
        logits.new_empty((batch, length), dtype=torch.int32),
        logits.new_empty((batch, length), dtype=torch.float32),
        logits.new_empty((batch, length), dtype=torch.float32),
        logits.new_empty((batch, length), dtype=torch.float64),
        logits.new_empty((batch, length, tiles), dtype=torch.float32),
        logits.new_empty((batch, length, tiles), dtype=torch.float32),
    )


@library.register_fake("dgemma::sample")
def _sample_fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[:2], dtype=torch.int32)


@library.register_fake("dgemma::soft_embedding")
def _soft_embedding_fake(logits: Tensor, *operands: Any) -> Tensor:
    embedding: Tensor = operands[10]
    return logits.new_empty((*logits.shape[:2], embedding.shape[1]))


def _in_place_fake(*_: object, **__: object) -> None:
    return None


for _name in ("vocabulary_statistics.out", "sample.out", "noise_", "update_canvas_", "soft_embedding.out"):
    library.register_fake(f"dgemma::{_name}", _in_place_fake)
