"""Checks a request in vLLM's front end, where what it cannot have becomes status 400 with the entry's name.

vLLM lets a logits processor check the settings of a request (`validate_params`), and a configuration class of the
model's name change how it is served. The latter adds the former here; it processes no logits.
"""

from __future__ import annotations

import itertools
from typing import Any

from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from dgemma_ext.checkpoint import GenerationDefaults
from dgemma_ext.integrations.vllm.request_options import ANSWERS, WIDTH, Limits, check, options_of, unknown
from dgemma_ext.integrations.vllm.requests import matching_without_prompt, tokenizer_of

_MODULE = "dgemma_ext.integrations.vllm.admission"
_number = itertools.count()


class Admission(LogitsProcessor):  # type: ignore[misc]
    """For each served model it has a subclass with its limits. The names of these are in vLLM's configuration, which
    other processes read too: there each stands for this class, which checks nothing."""

    limits: Limits
    model: str  # the folder of the tokenizer
    filters: tuple[int, float]  # top_k and top_p that the server gives where a request has none

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError naming what the sampler cannot do, or the entry of extra_args that is wrong."""
        _check_settings(sampling_params, cls.filters)
        options = options_of(sampling_params.extra_args)
        sampler = check(options, cls.limits, sampling_params.max_tokens)
        if options.grammar is not None:
            matching_without_prompt(options, cls.limits, sampler, sampling_params.max_tokens, tokenizer_of(cls.model))
        # vLLM's scheduler reads the width: a narrower canvas takes fewer of its tokens.
        narrow = sampler.canvas_length < cls.limits.canvas_length
        shared = options.seed is not None and sampling_params.n > 1
        told = {WIDTH: sampler.canvas_length if narrow else None, ANSWERS: sampling_params.n if shared else None}
        sampling_params.extra_args = _with(sampling_params.extra_args, told)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits


def _with(extra_args: dict[str, Any] | None, told: dict[str, int | None]) -> dict[str, Any] | None:
    """A copy of a request's extra_args with what the other processes are told. Raises ValueError where the request has
    another value there; the same one is there where parameters are used twice."""
    given = {name: value for name in told if (value := (extra_args or {}).get(name)) is not None}
    for name, value in given.items():
        if value != told[name]:
            raise ValueError(unknown(name))
    added = {name: value for name, value in told.items() if value is not None}
    return {**(extra_args or {}), **added} if added else extra_args


def _check_settings(params: Any, filters: tuple[int, float]) -> None:
    """Refuses what vLLM's own sampler does and this one does not, rather than leaving it out."""
    for name, unset in (("logprobs", None), ("prompt_logprobs", None), ("logprob_token_ids", None)):
        if getattr(params, name, unset) != unset:
            raise ValueError(f"{name} is not given by dgemma_ext's sampler (DGEMMA_VLLM_PARTS without sampler has it)")
    for name, default, off in (("top_k", filters[0], (0, -1)), ("top_p", filters[1], (1.0,))):
        value = getattr(params, name)
        if value != default and value not in off:
            raise ValueError(f"{name} is not known to the entropy-bound sampler; leave it out, got {value}")


def limits_of(vllm_config: Any) -> Limits:
    """What the model and its configuration let a request say."""
    model = vllm_config.model_config
    return Limits(
        vocabulary=model.get_vocab_size(),
        canvas_length=vllm_config.diffusion_config.canvas_length,
        defaults=defaults_of(model, vllm_config.diffusion_config),
        tensor_parallel=vllm_config.parallel_config.tensor_parallel_size,
        context=model.max_model_len,
    )


def defaults_of(model_config: Any, diffusion_config: Any) -> GenerationDefaults:
    """The sampler's defaults: of generation_config.json, as vLLM reads and overrides it."""
    values = dict(model_config.try_get_generation_config() or {})
    steps = diffusion_config.max_denoising_steps
    if steps:
        values["max_denoising_steps"] = steps
    values.pop("max_new_tokens", None)  # vLLM takes it away, or has a limit of its own
    return GenerationDefaults.from_dict(values)


def add_admission(vllm_config: Any) -> None:
    """Adds the check to the logits processors of a model (configuration.add).

    Raises ValueError where no step may have a whole canvas.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    length = vllm_config.diffusion_config.canvas_length
    for name, off in (("max_num_batched_tokens", None), ("long_prefill_token_threshold", 0)):
        most = getattr(scheduler, name)
        if most != off and most < length:
            raise ValueError(f"{name} is {most}, and a step takes a whole canvas of {length} tokens or none of it")
    given = model.get_diff_sampling_param()
    name = f"Admission{next(_number)}"
    filters = (given.get("top_k", 0), given.get("top_p", 1.0))
    limits = {"limits": limits_of(vllm_config), "model": model.model, "filters": filters}
    globals()[name] = type(name, (Admission,), limits)
    others = [one for one in model.logits_processors or [] if not str(one).startswith(f"{_MODULE}:")]
    model.logits_processors = [*others, f"{_MODULE}:{name}"]


def __getattr__(name: str) -> Any:
    if name.startswith("Admission"):
        return Admission
    raise AttributeError(name)
