"""Checks a request in vLLM's front end, where what it cannot have becomes status 400 with the entry's name.

vLLM lets a logits processor check the settings of a request (`validate_params`), and a configuration class of the
model's name change how it is served. The latter adds the former here; it processes no logits.
"""

from __future__ import annotations

import itertools
from typing import Any

from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from dgemma_ext.checkpoint import GenerationDefaults
from dgemma_ext.integrations.vllm.request_options import Limits, check, options_of
from dgemma_ext.integrations.vllm.requests import tokenizer_of
from dgemma_ext.sampling import compile_grammar

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
            size, defaults = cls.limits.vocabulary, cls.limits.defaults
            tokenizer = tokenizer_of(cls.model)
            compile_grammar(options.grammar, tokenizer, size, defaults.eos_token_ids, defaults.pad_token_id, False)
        if sampler.canvas_length < cls.limits.canvas_length:
            # vLLM's scheduler reads it: a narrower canvas takes fewer of its tokens.
            sampling_params.extra_args["diffusion_canvas_length"] = sampler.canvas_length

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits


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
    """Adds the check to the logits processors of a model (configuration.add)."""
    model = vllm_config.model_config
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
