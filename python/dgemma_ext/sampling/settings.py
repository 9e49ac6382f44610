"""Sampler settings of a request: the caller's, and the same with the checkpoint's defaults filled in.

Every setting means the same as in transformers' generation_diffusion_gemma.py: the entropy-bound sampler, the linear
temperature schedule, and stopping when the draft is stable and confident.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from dgemma_ext.checkpoint import GenerationDefaults


@dataclass(frozen=True)
class SamplerConfig:
    """Sampler settings. None takes the value of the checkpoint's generation_config.json (and its canvas length).

    max_denoising_steps: cap on the steps of a canvas. entropy_bound: nats; a position is accepted while the entropies
    of the positions with lower entropy sum to no more. t_min, t_max: the temperature falls linearly from t_max towards
    t_min. stability_threshold: a canvas stops when its draft has not changed for this many steps and its mean entropy
    is below confidence_threshold (nats). canvas_length: at most the checkpoint's. trim_canvas: shortens an answer's
    last canvas, in quarters, to the length limit or a pinned end of text. That is less work, and may change tokens,
    because the positions that are cut off would be seen by the others.
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
        """Fills in the defaults and checks every field; raises ValueError naming the field."""
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
        """The number of positions of canvas `index` in an answer of at most `end` tokens."""
        needed = end - index * self.canvas_length
        if not self.trim_canvas or needed >= self.canvas_length:
            return self.canvas_length
        # Rounded to quarters so that few lengths occur: each length has its own buffers and graphs.
        quarter = -(-self.canvas_length // 4)
        return min(-(-needed // quarter) * quarter, self.canvas_length)

    def temperature(self, step: int) -> float:
        """The temperature of a step, counted from 1: t_min + (t_max - t_min) * remaining / max_denoising_steps.

        Every operation is rounded to fp32, because transformers computes it on an fp32 tensor.
        """
        remaining = torch.tensor(self.max_denoising_steps - step + 1, dtype=torch.int32)
        return float(self.t_min + (self.t_max - self.t_min) * (remaining / self.max_denoising_steps))
