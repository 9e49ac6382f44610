"""The schedule and the canvas: how one canvas starts, and what one denoising step does to it.

The meaning of every operation is that of transformers' generation_diffusion_gemma.py: the entropy-bound sampler, the
linear temperature schedule, and stopping when the draft is stable and confident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from dgemma_ext.ops import denoise
from dgemma_ext.ops.vocabulary_head import vocabulary_head

if TYPE_CHECKING:
    from dgemma_ext.checkpoint.config import GenerationDefaults
    from dgemma_ext.diffusion_gemma import DiffusionGemma
    from dgemma_ext.model.cache import Cache


@dataclass(frozen=True)
class SamplerConfig:
    """How a request is sampled. None takes the checkpoint's generation_config.json (and its canvas length).

    max_denoising_steps: cap on the steps of a canvas. entropy_bound: nats; a position is accepted while the entropies
    of the surer ones sum to no more. t_min, t_max: the temperature falls linearly from t_max towards t_min.
    stability_threshold: for how many steps the draft must not change. confidence_threshold: nats; the mean entropy
    must be below. canvas_length: at most the checkpoint's. trim_canvas: leaves out of an answer's last canvas what
    lies beyond its length limit or a pinned end of text, in quarters of a canvas. That is less work, and may change
    tokens, because positions that would be cut off are seen by the others.
    """

    max_denoising_steps: int | None = None
    entropy_bound: float | None = None
    t_min: float | None = None
    t_max: float | None = None
    stability_threshold: int | None = None
    confidence_threshold: float | None = None
    eos_token_ids: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    canvas_length: int | None = None
    trim_canvas: bool = False

    def resolve(self, defaults: GenerationDefaults, canvas_length: int) -> ResolvedSampler:
        """Fills in what is None and checks the whole; raises ValueError naming the field."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        values = {f.name: getattr(defaults, f.name) for f in fields(self) if hasattr(defaults, f.name)}
        resolved = ResolvedSampler(**{**values, "canvas_length": canvas_length, **given})
        if resolved.canvas_length > canvas_length:
            raise ValueError(
                f"canvas_length must be at most the checkpoint's {canvas_length}, got {self.canvas_length}"
            )
        return resolved


@dataclass(frozen=True)
class ResolvedSampler:
    """A SamplerConfig with every field set and checked."""

    max_denoising_steps: int
    entropy_bound: float
    t_min: float
    t_max: float
    stability_threshold: int
    confidence_threshold: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    canvas_length: int
    trim_canvas: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        self._require(self.max_denoising_steps >= 1, "max_denoising_steps", "at least 1")
        self._require(self.canvas_length >= 1, "canvas_length", "at least 1")
        self._require(self.entropy_bound >= 0, "entropy_bound", "at least 0 nats")
        self._require(self.stability_threshold >= 0, "stability_threshold", "at least 0 steps")
        self._require(self.confidence_threshold >= 0, "confidence_threshold", "at least 0 nats")
        self._require(self.t_min >= 0, "t_min", "at least 0")
        self._require(0 < self.t_max < float("inf"), "t_max", "above 0 and finite")
        self._require(self.t_max >= self.t_min, "t_max", f"at least t_min, which is {self.t_min}")

    def _require(self, holds: bool, field: str, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{field} must be {wanted}, got {getattr(self, field)}")

    def length_of(self, index: int, end: int) -> int:
        """Positions of canvas `index` of an answer that has `end` tokens at most."""
        reached = end - index * self.canvas_length
        if not self.trim_canvas or reached >= self.canvas_length:
            return self.canvas_length
        # Quarters, so that few lengths occur: each has buffers and graphs of its own.
        quarter = -(-self.canvas_length // 4)
        return min(-(-reached // quarter) * quarter, self.canvas_length)

    def temperature(self, step: int) -> float:
        """Of the step, counted from 1: t_min + (t_max - t_min) * remaining / max_denoising_steps.

        In fp32 after every operation, because transformers computes it on an fp32 tensor.
        """
        remaining = torch.tensor(self.max_denoising_steps - step + 1, dtype=torch.int32)
        return float(self.t_min + (self.t_max - self.t_min) * (remaining / self.max_denoising_steps))


@dataclass(frozen=True)
class Canvas:
    """What a request's first canvases hold before the first step.

    tokens: ids that take the place of noise; None in the list leaves that position to noise. Tokens for n canvases
    cover the first n. pinned: one bool per token; a pinned position holds its token in every step and in the
    committed text. allowed: one list of ids for the whole answer, or one list (or None: all) per position.
    start_step: a later step to begin with (a lower temperature, fewer steps left) keeps an edit close to its text; it
    applies to canvases that have tokens.
    """

    tokens: Sequence[int | None] = ()
    pinned: Sequence[bool] | None = None
    allowed: Sequence[int] | Sequence[Sequence[int] | None] | None = None
    start_step: int = 1

    def first_step(self, index: int, length: int) -> int:
        """Of canvas `index`: start_step where it has tokens, else 1."""
        return self.start_step if len(self.tokens) > index * length else 1

    def certain_length(self, eos_token_ids: Sequence[int]) -> int | None:
        """Tokens up to the first pinned end of text; None where none is pinned."""
        pairs = enumerate(zip(self.tokens, self.pinned or (), strict=False), start=1)
        return next((count for count, (token, pinned) in pairs if pinned and token in eos_token_ids), None)

    def check(self, vocabulary: int, max_steps: int) -> None:
        """Raises ValueError naming the field."""
        for position, token in enumerate(self.tokens):
            if token is not None and not 0 <= token < vocabulary:
                raise ValueError(f"canvas.tokens[{position}] must be in [0, {vocabulary}) or None, got {token}")
        if self.pinned is not None:
            if len(self.pinned) != len(self.tokens):
                raise ValueError(
                    f"canvas.pinned must have {len(self.tokens)} entries, one per token, got {len(self.pinned)}"
                )
            for position, (token, pinned) in enumerate(zip(self.tokens, self.pinned, strict=True)):
                if pinned and token is None:
                    raise ValueError(f"canvas.pinned[{position}] is set where canvas.tokens has None")
                allowed = self.allowed_at(position)
                if pinned and allowed is not None and token not in allowed:
                    raise ValueError(
                        f"canvas.pinned[{position}] holds token {token}, which canvas.allowed does not allow"
                    )
        if not 1 <= self.start_step <= max_steps:
            raise ValueError(f"canvas.start_step must be in [1, {max_steps}], got {self.start_step}")
        for position in range(len(self.allowed or ()) if self._allowed_by_position else 1):
            ids = self.allowed_at(position)
            if ids is not None and (not ids or not all(0 <= i < vocabulary for i in ids)):
                raise ValueError(
                    f"canvas.allowed for position {position} must name ids in [0, {vocabulary}), got {ids!r}"
                )

    @property
    def _allowed_by_position(self) -> bool:
        return bool(self.allowed) and not all(isinstance(entry, int) for entry in self.allowed or ())

    def allowed_at(self, position: int) -> tuple[int, ...] | None:
        """The ids that a position of the answer may hold; None: all."""
        if self.allowed is None:
            return None
        if not self._allowed_by_position:
            return tuple(self.allowed)  # type: ignore[arg-type]
        entry = self.allowed[position] if position < len(self.allowed) else None
        return None if entry is None else tuple(entry)  # type: ignore[arg-type]


@dataclass
class CanvasState:
    """Canvases under work: the tensors that the step's ops read and write, for B requests (`begin_canvas`: one).

    Whatever differs from request to request or from step to step is a tensor on the device, so that a step has the same
    arguments every time.
    """

    canvas: torch.Tensor  # int32 [B, L]
    draft: torch.Tensor  # int32 [B, L], -1 before the first step
    accepted: torch.Tensor  # bool [B, L]
    entropy: torch.Tensor  # fp32 [B, L]
    pinned: torch.Tensor | None  # bool [B, L]
    allowed: torch.Tensor | None  # int32 bit mask [rows, ceil(vocabulary / 32)]
    allowed_row: torch.Tensor | None  # int32 [B, L]
    seed: torch.Tensor  # int64 [B]
    canvas_index: torch.Tensor  # int32 [B]
    step: torch.Tensor  # int32 [B]
    max_steps: torch.Tensor  # int32 [B]
    t_min: torch.Tensor  # fp64 [B]
    t_max: torch.Tensor  # fp64 [B]
    entropy_bound: torch.Tensor  # fp32 [B]
    stability_threshold: torch.Tensor  # int32 [B]
    confidence_threshold: torch.Tensor  # fp32 [B]
    temperature: torch.Tensor  # fp32 [B]
    active: torch.Tensor  # bool [B]
    stable_steps: torch.Tensor  # int32 [B]
    mean_entropy: torch.Tensor  # fp32 [B]
    status: torch.Tensor  # int32 [B], denoise.CanvasStatus
    soft_embedding: torch.Tensor | None = None  # [B, L, hidden]; None is exact zero

    @property
    def length(self) -> int:
        return self.canvas.shape[1]


def begin_canvas(
    model: DiffusionGemma,
    sampler: ResolvedSampler,
    seed: int,
    index: int,
    content: Canvas | None = None,
    length: int | None = None,
) -> CanvasState:
    """The state before the first step of canvas `index`: noise, and the tokens that `content` gives.

    length: of this canvas, where it is not the sampler's.
    """
    device, vocabulary = model.device, model.config.vocab_size
    length = length or sampler.canvas_length
    content = content or Canvas()
    start = index * sampler.canvas_length
    window = slice(start, start + length)
    tokens = list(content.tokens[window])
    start_step = content.first_step(index, sampler.canvas_length)
    given = [t is not None for t in tokens]
    pinned = list(content.pinned[window]) if content.pinned is not None else []
    masks, rows = _allowed_masks(content, window, vocabulary)
    draft = torch.full((1, length), -1, dtype=torch.int32, device=device)

    # Filled on the device, or copied without waiting: steps that are still under way there need not end first.
    def scalar(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((1,), value, dtype=dtype, device=device)

    def row(values: list[int] | list[bool], dtype: torch.dtype) -> torch.Tensor:
        padded = [*values, *[0] * (length - len(values))]
        return torch.tensor([padded], dtype=dtype).to(device, non_blocking=True)

    state = CanvasState(
        canvas=row([t or 0 for t in tokens], torch.int32) if tokens else torch.zeros_like(draft),
        draft=draft,
        accepted=torch.zeros(1, length, dtype=torch.bool, device=device),
        entropy=torch.zeros(1, length, device=device),
        pinned=row(pinned, torch.bool) if any(pinned) else None,
        allowed=None if masks is None else masks.to(device),
        allowed_row=None if rows is None else rows.to(device),
        seed=scalar(seed, torch.int64),
        canvas_index=scalar(index, torch.int32),
        step=scalar(start_step, torch.int32),
        max_steps=scalar(sampler.max_denoising_steps, torch.int32),
        t_min=scalar(sampler.t_min, torch.float64),
        t_max=scalar(sampler.t_max, torch.float64),
        entropy_bound=scalar(sampler.entropy_bound, torch.float32),
        stability_threshold=scalar(sampler.stability_threshold, torch.int32),
        confidence_threshold=scalar(sampler.confidence_threshold, torch.float32),
        temperature=scalar(sampler.temperature(start_step), torch.float32),
        active=scalar(True, torch.bool),
        stable_steps=scalar(0, torch.int32),
        mean_entropy=scalar(0.0, torch.float32),
        status=scalar(0, torch.int32),
    )
    denoise.noise_(
        state.canvas,
        vocabulary=vocabulary,
        purpose=denoise.Purpose.INITIAL_NOISE,
        seed=state.seed,
        canvas_index=state.canvas_index,
        step=torch.zeros_like(state.step),
        keep=row(given, torch.bool) if any(given) else None,
        allowed=state.allowed,
        allowed_row=state.allowed_row,
    )
    return state


def _allowed_masks(content: Canvas, window: slice, vocabulary: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Bit masks of the different allowed sets inside a canvas, and each position's row of them (-1: all)."""
    if content.allowed is None:
        return None, None
    sets: dict[tuple[int, ...], int] = {}
    rows = []
    for position in range(window.start, window.stop):
        ids = content.allowed_at(position)
        rows.append(-1 if ids is None else sets.setdefault(ids, len(sets)))
    if not sets:
        return None, None
    return denoise.pack_allowed(list(sets), vocabulary), torch.tensor([rows], dtype=torch.int32)


def denoising_step(
    model: DiffusionGemma,
    cache: Cache,
    slot: int,
    state: CanvasState,
    logits: torch.Tensor | None = None,
    sample_uniforms: torch.Tensor | None = None,
    renoise_uniforms: torch.Tensor | None = None,
    pending: torch.Tensor | None = None,
) -> None:
    """One step of one canvas, in place: pass, statistics, sampling, acceptance, renoising, stop, soft embedding.

    logits: a buffer [1, L, vocabulary] for the raw logits. The uniforms (float64 [1, L]) replace the drawn ones.
    pending: int [1, n], tokens that the same pass encodes into the slot, for the canvas to see.
    """
    hidden = model.last_hidden(state.canvas, cache, slot, state.soft_embedding, pending)
    reading = _reading(model, state)
    raw, statistics = vocabulary_head(hidden, model.weights.embed_tokens, **reading, logits=logits)
    _advance(model, state, raw, reading, statistics, sample_uniforms, renoise_uniforms)


def update_canvas(
    model: DiffusionGemma,
    state: CanvasState,
    raw: torch.Tensor,
    sample_uniforms: torch.Tensor | None = None,
    renoise_uniforms: torch.Tensor | None = None,
) -> None:
    """What follows the head in a step: everything is computed from the raw logits [1, L, vocabulary]."""
    reading = _reading(model, state)
    statistics = denoise.vocabulary_statistics(raw, **reading)
    _advance(model, state, raw, reading, statistics, sample_uniforms, renoise_uniforms)


def _reading(model: DiffusionGemma, state: CanvasState) -> dict[str, Any]:
    """How the logits of a step are read."""
    return {
        "softcap": model.config.final_logit_softcapping,
        # The update writes the next step's temperature over this one's, which the soft embedding still reads.
        "temperature": state.temperature.clone(),
        "active": None,
        "allowed": state.allowed,
        "allowed_row": state.allowed_row,
    }


def _advance(
    model: DiffusionGemma,
    state: CanvasState,
    raw: torch.Tensor,
    reading: dict[str, Any],
    statistics: denoise.VocabularyStatistics,
    sample_uniforms: torch.Tensor | None,
    renoise_uniforms: torch.Tensor | None,
) -> None:
    """Sampling, acceptance, renoising, stop and soft embedding, from the raw logits and their statistics."""
    decide(model, state, raw, reading, statistics, sample_uniforms, renoise_uniforms)
    state.entropy = statistics.entropy
    if bool(state.active):
        state.soft_embedding = embed_softly(model, state, raw, reading, statistics)


def _masses(statistics: denoise.VocabularyStatistics) -> dict[str, Any]:
    return {name: getattr(statistics, name) for name in ("row_max", "row_sum", "tile_max", "tile_sum")}


def decide(
    model: DiffusionGemma,
    state: CanvasState,
    raw: torch.Tensor,
    reading: dict[str, Any],
    statistics: denoise.VocabularyStatistics,
    sample_uniforms: torch.Tensor | None = None,
    renoise_uniforms: torch.Tensor | None = None,
    sampled: torch.Tensor | None = None,
) -> None:
    """Sampling, acceptance, renoising and stop, of the active requests. sampled: where to put the drawn tokens."""
    sampled = denoise.sample(
        raw,
        **reading,
        **_masses(statistics),
        seed=state.seed,
        canvas_index=state.canvas_index,
        step=state.step,
        uniforms=sample_uniforms,
        out=sampled,
    )
    denoise.update_canvas_(
        sampled,
        statistics.argmax,
        statistics.entropy,
        pinned=state.pinned,
        allowed=state.allowed,
        allowed_row=state.allowed_row,
        uniforms=renoise_uniforms,
        vocabulary=model.config.vocab_size,
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


def embed_softly(
    model: DiffusionGemma,
    state: CanvasState,
    raw: torch.Tensor,
    reading: dict[str, Any],
    statistics: denoise.VocabularyStatistics,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next step's self-conditioning [B, L, hidden]."""
    return denoise.soft_embedding(
        raw,
        **reading,
        **_masses(statistics),
        pinned=state.pinned,
        embedding=model.weights.embed_tokens,
        embedding_scale=model.embedding_scale,
        tolerance=model.soft_embedding_tolerance,
        max_embedding_norm=model.max_embedding_norm,
        out=out,
        workspace=workspace,
    )
