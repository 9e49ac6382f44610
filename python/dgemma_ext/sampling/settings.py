"""Sampler settings of a request: the caller's, and the same with the checkpoint's defaults filled in.

Every setting means the same as in transformers' generation_diffusion_gemma.py: the entropy-bound sampler, the linear
temperature schedule, and stopping when the draft is stable and confident.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from dgemma_ext import arguments
from dgemma_ext.checkpoint import GenerationDefaults


def _count(least: int) -> Callable[[str, Any], int]:
    return lambda field, value: arguments.integer(field, value, least)


def _above_zero(field: str, value: Any) -> float:
    return arguments.number(field, value, zero=False)


def _token_ids(field: str, value: Any) -> tuple[int, ...]:
    return tuple(arguments.integers(field, value, "a sequence of token ids", unordered=True))


# Logits divided by a temperature are fp32, at most 3.4e38; those of a soft cap are below 100.
_LEAST_TEMPERATURE = 1e-30

# What each field takes; steps and lengths are int32 in the kernels.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_denoising_steps": _count(1),
    "entropy_bound": arguments.number,
    "t_min": arguments.number,
    "t_max": _above_zero,
    "stability_threshold": _count(0),
    "confidence_threshold": arguments.number,
    "eos_token_ids": _token_ids,
    "canvas_length": _count(1),
    "trim_canvas": arguments.flag,
}


@dataclass(frozen=True)
class SamplerConfig:
    """Sampler settings. None takes the value of the checkpoint's generation_config.json (and its canvas length).

    max_denoising_steps: cap on the steps of a canvas. entropy_bound: nats; a position is accepted while the entropies
    of the positions with lower entropy sum to no more. t_min, t_max: the temperature falls linearly from t_max towards
    t_min. stability_threshold: a canvas stops when its draft has not changed for this many steps and its mean entropy
    is below confidence_threshold (nats). canvas_length: at most the checkpoint's. trim_canvas: shortens an answer's
    last canvas, in quarters, to the length limit or a pinned end of text. That is less work, and may change tokens,
    because the positions that are cut off would be seen by the others.

    Numbers may be numpy's or torch's; each is kept as Python's. Raises ValueError naming the field.
    """

    max_denoising_steps: int | None = None
    entropy_bound: float | None = None
    t_min: float | None = None
    t_max: float | None = None
    stability_threshold: int | None = None
    confidence_threshold: float | None = None
    eos_token_ids: Sequence[int] | None = None
    canvas_length: int | None = None
    trim_canvas: bool = False

    def __post_init__(self) -> None:
        for field, check in _CHECKS.items():
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, check(field, value))

    def resolve(self, defaults: GenerationDefaults, canvas_length: int) -> ResolvedSampler:
        """Fills in the defaults and checks every field; raises ValueError naming the field."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        values = {f.name: getattr(defaults, f.name) for f in fields(self) if hasattr(defaults, f.name)}
        resolved = ResolvedSampler(**{**values, "canvas_length": canvas_length, **given})
        if resolved.canvas_length > canvas_length:
            raise arguments.refusal("canvas_length", f"at most the checkpoint's {canvas_length}", self.canvas_length)
        return resolved


def resolve_sampler(sampler: SamplerConfig | None, defaults: GenerationDefaults, canvas_length: int) -> ResolvedSampler:
    """`SamplerConfig.resolve` of a request's argument `sampler`; None has the defaults."""
    if sampler is None:
        sampler = SamplerConfig()
    wanted = "a dg.SamplerConfig or None"
    return arguments.instance("sampler", sampler, SamplerConfig, wanted).resolve(defaults, canvas_length)


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
    canvas_length: int
    trim_canvas: bool = False

    def __post_init__(self) -> None:
        for field, check in _CHECKS.items():
            object.__setattr__(self, field, check(field, getattr(self, field)))
        if self.t_max < self.t_min:
            raise arguments.refusal("t_max", f"at least t_min, which is {self.t_min}", self.t_max)
        if self.temperature(self.max_denoising_steps) < _LEAST_TEMPERATURE:
            wanted = f"so large that the last step's temperature is at least {_LEAST_TEMPERATURE}"
            raise arguments.refusal("t_max", wanted, self.t_max)

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
        remaining = torch.tensor(self.max_denoising_steps - step + 1, dtype=torch.float32, device="cpu")
        return float(self.t_min + (self.t_max - self.t_min) * (remaining / self.max_denoising_steps))
