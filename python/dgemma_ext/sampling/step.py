"""The beginning of a canvas, and the denoising step of a batch, whatever its requests' steps, prefixes and settings.

`denoising_step` can be captured in a CUDA graph: it reads no value on the host, allocates nothing that outlives it, and
does not depend on how many of its rows are in use. On the CPU a row's bits do not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from dgemma_ext.model import Cache, Network, PrefillChunk
from dgemma_ext.ops import automaton, denoise
from dgemma_ext.ops.vocabulary_head import vocabulary_head
from dgemma_ext.sampling.canvas import Canvas
from dgemma_ext.sampling.constraint import ConstraintRows
from dgemma_ext.sampling.settings import ResolvedSampler
from dgemma_ext.sampling.state import CanvasBatch, CanvasState, StepBuffers, canvases_of


class LogitsParams(TypedDict):
    """The arguments by which the operators of a step read its raw logits (ops.denoise)."""

    softcap: float
    temperature: Tensor
    active: Tensor
    allowed: Tensor
    allowed_row: Tensor


class SoftmaxStatistics(TypedDict):
    """The statistics of the softmax that later operators read (ops.denoise)."""

    row_max: Tensor
    row_sum: Tensor
    tile_max: Tensor
    tile_sum: Tensor


def begin_canvas(
    network: Network,
    batch: CanvasBatch,
    row: int,
    sampler: ResolvedSampler,
    seed: int,
    index: int,
    content: Canvas | None = None,
) -> int:
    """Fills a row for canvas `index` of a request: noise, and the tokens and allowed sets of `content`.

    Returns the number of masks of allowed tokens that the canvas uses.
    """
    state, length = batch.state.rows_between(row, row + 1), batch.length
    content = content or Canvas()
    window = slice(index * sampler.canvas_length, index * sampler.canvas_length + length)
    tokens = list(content.tokens[window])
    pinned = list(content.pinned[window]) if content.pinned is not None else []
    start_step = content.first_step(index, sampler.canvas_length)
    given = _padded([token is not None for token in tokens], length, torch.bool)
    masks = _set_allowed(state, row, content, window, network.config.vocab_size)

    # Filled on the device, or copied asynchronously, so that the host does not wait for steps that are queued there.
    state.canvas.copy_(_padded([token or 0 for token in tokens], length, torch.int32), non_blocking=True)
    state.pinned.copy_(_padded(pinned, length, torch.bool), non_blocking=True)
    for tensor, value in (
        (state.draft, -1),
        (state.accepted, False),
        (state.entropy, 0.0),
        (state.seed, seed),
        (state.canvas_index, index),
        (state.step, start_step),
        (state.max_steps, sampler.max_denoising_steps),
        (state.t_min, sampler.t_min),
        (state.t_max, sampler.t_max),
        (state.entropy_bound, sampler.entropy_bound),
        (state.stability_threshold, sampler.stability_threshold),
        (state.confidence_threshold, sampler.confidence_threshold),
        (state.temperature, sampler.temperature(start_step)),
        (state.active, True),
        (state.stable_steps, 0),
        (state.mean_entropy, 0.0),
        (state.status, denoise.CanvasStatus.RUNNING),
        (state.matches, 1),
        (state.soft_embedding, 0.0),
    ):
        tensor.fill_(value)
    denoise.noise_(
        state.canvas,
        vocabulary=network.config.vocab_size,
        purpose=denoise.Purpose.INITIAL_NOISE,
        seed=state.seed,
        canvas_index=state.canvas_index,
        step=torch.zeros_like(state.step),
        keep=given.to(network.device, non_blocking=True),
    )
    return masks


def _padded(values: Sequence[int | bool], length: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([[*values, *[0] * (length - len(values))]], dtype=dtype, device="cpu")


def _set_allowed(state: CanvasState, row: int, content: Canvas, window: slice, vocabulary: int) -> int:
    """Writes a mask for each different allowed set of a canvas, and each position's mask index; returns their count."""
    length, sets = state.length, dict[tuple[int, ...], int]()
    rows, index, previous = [], -1, None
    for position in range(window.start, window.stop):
        ids = content.allowed_at(position)
        if ids is not previous:  # one list for the whole answer is hashed once
            index = -1 if ids is None else row * length + sets.setdefault(ids, len(sets))
            previous = ids
        rows.append(index)
    masks = state.allowed[row * length : row * length + len(sets)]
    masks.copy_(denoise.pack_allowed(list(sets), vocabulary), non_blocking=True)
    state.allowed_row.copy_(torch.tensor([rows], dtype=torch.int32, device="cpu"), non_blocking=True)
    return len(sets)


def denoising_step(
    network: Network,
    cache: Cache,
    batch: CanvasBatch,
    buffers: StepBuffers,
    chunks: Sequence[PrefillChunk] = (),
    self_conditioned: bool = True,
    constrained: bool = True,
    adapted: bool = True,
) -> None:
    """Advances every active row by one step, in place; other rows stay as they are.

    buffers: for as many rows as the batch has. chunks: tokens that the same pass encodes; each row's prefix_length
    counts its chunk already. A step with chunks cannot be captured, because its shapes depend on their lengths.
    self_conditioned: False leaves the self-conditioning out, which is exact where no row has made a step.
    constrained, adapted: False leaves grammars, and adapters, out, which is exact where no row has one. A captured step
    with grammars runs as long as `batch.constraints.version` is what it was, one with adapters as long as
    `batch.adapters.version` is.

    Inactive rows only cost their part of the dense products: attention, experts, head and everything after skip them.
    """
    hidden = network.forward(cache, canvases_of(batch, buffers, self_conditioned, adapted), chunks)
    assert hidden is not None, "a step has canvases"
    statistics = buffers.statistics_of(batch.state)
    params = logits_params(network, batch.state, buffers)
    vocabulary_head(hidden, network.weights.embed_tokens, **params, logits=buffers.logits, out=statistics)
    sample_and_update(
        network, batch.state, buffers, params, constraints=_constraints_of(batch) if constrained else None
    )
    soft_embedding(network, batch.state, buffers, params)


def _constraints_of(batch: CanvasBatch) -> ConstraintRows | None:
    """Those of the batch's rows, None where no row has a grammar."""
    begin, end = batch.first_row, batch.first_row + batch.rows
    if not batch.constraints.any_between(begin, end):
        return None
    batch.constraints.update()
    return batch.constraints.rows_between(begin, end)


def logits_params(network: Network, state: CanvasState, buffers: StepBuffers) -> LogitsParams:
    """The parameters of a step's logits. Copies the temperature, because the update overwrites it with the next."""
    buffers.temperature.copy_(state.temperature)
    return LogitsParams(
        softcap=network.config.final_logit_softcapping,
        temperature=buffers.temperature,
        active=state.active,
        allowed=state.allowed,
        allowed_row=state.allowed_row,
    )


def sample_and_update(
    network: Network,
    state: CanvasState,
    buffers: StepBuffers,
    params: LogitsParams,
    sample_uniforms: Tensor | None = None,
    renoise_uniforms: Tensor | None = None,
    constraints: ConstraintRows | None = None,
) -> None:
    """Samples, accepts, renoises and decides to stop, from the raw logits and their statistics.

    sample_uniforms, renoise_uniforms: float64 [B, L], to use in place of drawn ones. constraints: of the rows, None
    where no row has a grammar.
    """
    statistics = buffers.statistics_of(state)
    sampled = denoise.sample(
        buffers.logits,
        **params,
        **softmax_statistics(statistics),
        seed=state.seed,
        canvas_index=state.canvas_index,
        step=state.step,
        uniforms=sample_uniforms,
        out=buffers.sampled,
    )
    if constraints is not None:
        constrain(constraints, buffers.logits, params, state, sample_uniforms, statistics.argmax, sampled)
    denoise.update_canvas_(
        sampled,
        statistics.argmax,
        statistics.entropy,
        pinned=state.pinned,
        uniforms=renoise_uniforms,
        vocabulary=network.config.vocab_size,
        seed=state.seed,
        canvas_index=state.canvas_index,
        max_steps=state.max_steps,
        t_min=state.t_min,
        t_max=state.t_max,
        entropy_bound=state.entropy_bound,
        stability_threshold=state.stability_threshold,
        confidence_threshold=state.confidence_threshold,
        active=state.active,
        canvas=state.canvas,
        draft=state.draft,
        stable_steps=state.stable_steps,
        step=state.step,
        temperature=state.temperature,
        accepted=state.accepted,
        mean_entropy=state.mean_entropy,
        status=state.status,
    )


def constrain(
    constraints: ConstraintRows,
    logits: Tensor,
    params: LogitsParams,
    state: CanvasState,
    uniforms: Tensor | None,
    argmax: Tensor,
    sampled: Tensor,
) -> None:
    """Makes the draft, the draw and the acceptance key of a step what they are given the rows' grammars.

    Writes argmax, sampled and the state's entropy and matches. A row without a canvas that matches ends here.
    """
    batch, length = state.canvas.shape
    device = logits.device
    statistics = automaton.make_class_statistics(batch, length, constraints.most_classes, device)
    chosen = torch.zeros_like(state.canvas)
    remainder = torch.zeros(batch, length, dtype=torch.float64, device=device)
    held = {"arena": constraints.arena, "descriptor": constraints.descriptor, "pinned": state.pinned}
    automaton.class_statistics_(logits, **params, **held, canvas=state.canvas, **statistics._asdict())
    automaton.constrain_(
        **held,
        most_states=constraints.most_states,
        most_sets=constraints.most_sets,
        **statistics._asdict(),
        active=state.active,
        state=constraints.state,
        tokens_left=constraints.tokens_left,
        max_steps=state.max_steps,
        seed=state.seed,
        canvas_index=state.canvas_index,
        step=state.step,
        uniforms=uniforms,
        argmax=argmax,
        entropy=state.entropy,
        chosen_class=chosen,
        remainder=remainder,
        matches=state.matches,
    )
    # Not active, it is left as it is by all that follows, and the host finds it as one that has failed.
    state.active.logical_and_(state.matches)
    state.status.masked_fill_(state.matches == 0, denoise.CanvasStatus.NON_FINITE)
    automaton.sample_class_(
        logits, **params, **held, chosen_class=chosen, remainder=remainder, matches=state.matches, tokens=sampled
    )


def soft_embedding(network: Network, state: CanvasState, buffers: StepBuffers, params: LogitsParams) -> None:
    """Writes the next step's self-conditioning, for the rows that are still active."""
    denoise.soft_embedding(
        buffers.logits,
        **params,
        **softmax_statistics(buffers.statistics_of(state)),
        pinned=state.pinned,
        embedding=network.weights.embed_tokens,
        embedding_scale=network.embedding_scale,
        tolerance=network.soft_embedding_tolerance,
        max_embedding_norm=network.max_embedding_norm,
        out=state.soft_embedding,
        workspace=buffers.workspace,
    )


def softmax_statistics(statistics: denoise.VocabularyStatistics) -> SoftmaxStatistics:
    return SoftmaxStatistics(
        row_max=statistics.row_max,
        row_sum=statistics.row_sum,
        tile_max=statistics.tile_max,
        tile_sum=statistics.tile_sum,
    )
