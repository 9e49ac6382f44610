"""A denoising step of transformers' `generate` by `ops.denoise`, in place of `_denoising_step`.

transformers passes the processed logits from step to step and computes the next step's soft embedding from them inside
the decoder. Here the raw logits stay in the model's dtype; statistics, sampling, acceptance, renoising, stop and soft
embedding are computed from them, and a hook passes the soft embedding to the self-conditioning module. A `Step` goes
from step to step in place of the logits.

`denoising_step` has the arguments and results of transformers' method and replaces it on one model. For a sampler,
stopping criterion or logits processor of the user's, and for a compiled loop, transformers' own method runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

from dgemma_ext.errors import NonFiniteError
from dgemma_ext.integrations.transformers.fallback import acceleration_of, tensors_refused
from dgemma_ext.model.network import SOFT_EMBEDDING_TOLERANCE, largest_row_norm
from dgemma_ext.ops import denoise
from dgemma_ext.ops.denoise import CanvasStatus
from dgemma_ext.sampling.step import softmax_statistics

_NEVER = 2**31 - 1  # stability threshold without a stopping criterion

_ARGUMENTS = {
    *("self", "decoder_forward", "current_canvas", "argmax_canvas", "input_ids", "decoder_position_ids"),
    *("self_conditioning_logits", "mask_mapping", "finished_denoising", "cur_step", "sampler", "logits_processor"),
    *("diffusion_stopping_criteria", "model_kwargs"),
}
# What methods call the cache: since 5.24, and before.
_CACHE_NAMES = ("cache", "past_key_values")


def unknown_arguments(model: Any) -> str | None:
    """The reason that the step of this transformers is not replaced, or None."""
    method = type(model)._denoising_step
    arguments = tuple(inspect.signature(method).parameters)
    if set(arguments) - {cache_name(method)} != _ARGUMENTS or cache_name(type(model.model).forward) is None:
        return f"its method takes other arguments than known ({', '.join(arguments)})"
    return None


@functools.cache
def cache_name(method: Callable[..., Any]) -> str | None:
    """The name that a method of transformers has for its cache argument."""
    arguments = inspect.signature(method).parameters
    return next((name for name in _CACHE_NAMES if name in arguments), None)


@dataclass
class Step:
    """The state between two steps of a canvas; transformers' loop carries it as `self_conditioning_logits`.

    Shapes as in `ops.denoise`: raw [batch, length, vocabulary], by position [batch, length], by row [batch].
    """

    seed: Tensor
    canvas_index: Tensor
    number: Tensor  # the next step, counted from 1
    max_steps: Tensor
    canvas: Tensor
    draft: Tensor
    accepted: Tensor
    stable_steps: Tensor
    active: Tensor
    mean_entropy: Tensor
    status: Tensor
    softcap: float
    stopped: Tensor = field(init=False)  # rows whose draft is stable, without those that only reached the step cap
    raw: Tensor = field(init=False)
    temperature: Tensor = field(init=False)
    soft_embedding: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.stopped = ~self.active

    def logits(self) -> Tensor:
        """The processed logits as transformers passes them on: rounded to the model's dtype."""
        capped = torch.tanh(self.raw.float() / self.softcap) * self.softcap
        return (capped / self.temperature[:, None, None]).to(self.raw.dtype)

    def cpu(self) -> Tensor:
        """The processed logits on the CPU: transformers' loop calls this for a streamer that takes logits."""
        return self.logits().cpu()


@torch.no_grad()
def denoising_step(self: Any, **arguments: Any) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Replaces transformers' `_denoising_step`. `self` is the model; `generate` passes all arguments by keyword."""
    asked = ("decoder_forward", "sampler", "logits_processor", "diffusion_stopping_criteria")
    reason = _refused(self, *(arguments[name] for name in asked))
    if reason is None:
        cache = arguments.pop(str(cache_name(type(self)._denoising_step)))
        return _step_on_kernels(self, cache=cache, **arguments)
    acceleration_of(self).fall_back("sampler", reason)
    carried = arguments["self_conditioning_logits"]
    if isinstance(carried, Step):
        arguments["self_conditioning_logits"] = carried.logits()
    return type(self)._denoising_step(self, **arguments)


def _step_on_kernels(
    model: Any,
    decoder_forward: Callable[..., Any],
    current_canvas: Tensor,
    argmax_canvas: Tensor,
    input_ids: Tensor,
    decoder_position_ids: Tensor,
    self_conditioning_logits: Tensor | Step | None,
    mask_mapping: dict[str, Tensor | None],
    cache: Any,
    finished_denoising: Tensor,
    cur_step: int,
    sampler: Any,
    logits_processor: Any,
    diffusion_stopping_criteria: Any,
    **model_kwargs: Any,
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """A step on the kernels. cur_step counts down to 1."""
    step, given = self_conditioning_logits, None
    if not isinstance(step, Step):
        step, given = begin(current_canvas, finished_denoising, cur_step, model.final_logit_softcapping), step
    decoder = model.model.decoder
    with _soft_embedding(decoder, None if not isinstance(self_conditioning_logits, Step) else step.soft_embedding):
        hidden = model.model(
            decoder_input_ids=current_canvas,
            self_conditioning_logits=given,
            decoder_attention_mask=mask_mapping,
            decoder_position_ids=decoder_position_ids,
            **{str(cache_name(type(model.model).forward)): cache},
            **model_kwargs,
        ).last_hidden_state
    raw = model.lm_head(hidden).contiguous()
    advance(
        step,
        raw,
        temperature=temperature_of(logits_processor, cur_step),
        entropy_bound=sampler.entropy_bound,
        stopping=diffusion_stopping_criteria,
        table=decoder.embed_tokens,
    )
    sampler.accepted_token_mask = step.accepted
    return step.canvas.long(), step.draft.long(), step, step.stopped


def _refused(model: Any, decoder_forward: Any, sampler: Any, processors: Any, stopping: Any) -> str | None:
    if "forward" in vars(model):
        return "the model's forward was replaced"
    if decoder_forward != model.forward:
        return (
            "the loop is compiled, its passes too (disable_compile=True, or a dynamic cache, leaves it to the kernels)"
        )
    if (
        type(sampler) is not generation.EntropyBoundSampler
        or {"accept_canvas", "renoise_canvas"} & vars(sampler).keys()
    ):
        return f"it is a {type(sampler).__name__} of its own, and the kernels have EntropyBoundSampler"
    if stopping is not None and type(stopping) is not generation.StableAndConfidentStoppingCriteria:
        return f"it stops by {type(stopping).__name__}, and the kernels by StableAndConfidentStoppingCriteria"
    others = [type(one).__name__ for one in processors if not _is_schedule(one)]
    if others or len(processors) > 1:
        return f"logits processors are given ({', '.join(others) or 'several schedules'})"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    return tensors_refused(model.lm_head.weight, model.model.decoder.embed_tokens.weight)


def _is_schedule(processor: Any) -> bool:
    return type(processor) is generation.LinearTemperatureScheduleLogitsProcessor


def temperature_of(processors: Any, cur_step: int) -> float:
    """The temperature of LinearTemperatureScheduleLogitsProcessor, rounded to fp32 after every operation as there; 1
    without a processor."""
    if len(processors) == 0:
        return 1.0
    schedule = processors[0]
    remaining = torch.tensor(cur_step, dtype=torch.int32)
    share = remaining / schedule.max_denoising_steps
    return float(schedule.t_min + (schedule.t_max - schedule.t_min) * share)


def draw_streams(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Seeds of a canvas, int64 [batch], from the device's torch generator, and canvas indices, int32 [batch]."""
    seeds = torch.randint(2**63 - 1, (batch,), dtype=torch.int64, device=device)
    return seeds, torch.zeros(batch, dtype=torch.int32, device=device)


def begin(canvas: Tensor, finished: Tensor, steps: int, softcap: float) -> Step:
    """The state before the first step of a canvas [batch, length] with at most `steps` steps."""
    batch, device = canvas.shape[0], canvas.device
    seed, canvas_index = draw_streams(batch, device)
    by_row = functools.partial(_by_row, batch, device)
    return Step(
        seed=seed,
        canvas_index=canvas_index,
        number=by_row(1, torch.int32),
        max_steps=by_row(steps, torch.int32),
        canvas=canvas.to(torch.int32).contiguous(),
        draft=torch.full(canvas.shape, -1, dtype=torch.int32, device=device),
        accepted=torch.zeros(canvas.shape, dtype=torch.bool, device=device),
        stable_steps=by_row(0, torch.int32),
        active=~finished,
        mean_entropy=by_row(0.0, torch.float32),
        status=by_row(0, torch.int32),
        softcap=softcap,
    )


def _by_row(batch: int, device: torch.device, value: float, dtype: torch.dtype) -> Tensor:
    return torch.full((batch,), value, dtype=dtype, device=device)


def advance(
    step: Step,
    raw: Tensor,
    temperature: float,
    entropy_bound: float,
    stopping: Any,
    table: Any,
    uniforms: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Advances `step` in place by the head's raw logits [batch, length, vocabulary].

    stopping: a StableAndConfidentStoppingCriteria or None. table: the decoder's embedding module. uniforms: for
    sampling and for renoising, float64 [batch, length] each, to use in place of drawn ones.

    Raises dg.NonFiniteError where a logit is not finite.
    """
    batch, vocabulary = raw.shape[0], raw.shape[2]
    by_row = functools.partial(_by_row, batch, raw.device)
    running = step.active.clone()
    if not bool(running.all()):
        # A stopped row keeps its logits, for a streamer that takes them.
        raw[~running] = step.raw[~running]
        temperatures = torch.where(running, temperature, step.temperature)
    else:
        temperatures = by_row(temperature, torch.float32)
    step.raw, step.temperature = raw, temperatures
    params: dict[str, Any] = dict(
        softcap=step.softcap, temperature=temperatures, active=running, allowed=None, allowed_row=None
    )
    statistics = denoise.vocabulary_statistics(raw, **params)
    softmax = softmax_statistics(statistics)
    draws: dict[str, Any] = dict(seed=step.seed, canvas_index=step.canvas_index)
    sampled = denoise.sample(
        raw, **params, **softmax, **draws, step=step.number, uniforms=None if uniforms is None else uniforms[0]
    )
    never = stopping is None
    denoise.update_canvas_(
        sampled,
        statistics.argmax,
        statistics.entropy,
        pinned=None,
        uniforms=None if uniforms is None else uniforms[1],
        vocabulary=vocabulary,
        **draws,
        max_steps=step.max_steps,
        # The operator's temperature schedule is not used: cur_step gives the temperature.
        t_min=by_row(1.0, torch.float64),
        t_max=by_row(1.0, torch.float64),
        entropy_bound=by_row(entropy_bound, torch.float32),
        stability_threshold=by_row(_NEVER if never else stopping.stability_threshold, torch.int32),
        confidence_threshold=by_row(0.0 if never else stopping.confidence_threshold, torch.float32),
        active=step.active,
        canvas=step.canvas,
        draft=step.draft,
        stable_steps=step.stable_steps,
        step=step.number,
        temperature=temperatures.clone(),
        accepted=step.accepted,
        mean_entropy=step.mean_entropy,
        status=step.status,
    )
    for row, status in enumerate(step.status.tolist()):
        if status == CanvasStatus.NON_FINITE:
            message = "the logits of this row of the batch are not finite"
            raise NonFiniteError(message, request=row, step=int(step.number[row]))
    step.stopped = step.stopped | (step.status == CanvasStatus.STABLE)
    if bool(step.active.any()):
        step.soft_embedding = denoise.soft_embedding(
            raw,
            **(params | {"active": step.active.clone()}),
            **softmax,
            pinned=None,
            embedding=table.weight.detach().contiguous(),
            embedding_scale=float(table.embed_scale.to(raw.dtype)),
            tolerance=SOFT_EMBEDDING_TOLERANCE[raw.dtype],
            max_embedding_norm=_largest_row_norm(table),
        )


def _largest_row_norm(table: Any) -> float:
    """max over v of ||weight[v]||, cached in the module until its weight changes."""
    weight = table.weight.detach()
    key = (weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version)
    known: tuple[Any, float] | None = table.__dict__.get("_dgemma_largest_row_norm")
    if known is None or known[0] != key:
        known = key, largest_row_norm(weight)
        table.__dict__["_dgemma_largest_row_norm"] = known
    return known[1]


@contextmanager
def _soft_embedding(decoder: Any, soft: Tensor | None) -> Iterator[None]:
    """Inside the block, the decoder's self-conditioning module gets `soft` in place of the decoder's zeros."""
    if soft is None:
        yield
        return

    def replaced(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0], soft, *arguments[2:])

    # Prepended, so that other hooks see the replaced argument.
    handle = decoder.self_conditioning.register_forward_pre_hook(replaced, prepend=True)
    try:
        yield
    finally:
        handle.remove()
