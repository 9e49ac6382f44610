"""What a request may say in vLLM's `extra_args` (`vllm_xargs` over HTTP), by the names of this package.

    seed                    int, 0 to 2**63 - 1; without one it follows from the request's id
    max_denoising_steps, entropy_bound, t_min, t_max, stability_threshold, confidence_threshold, canvas_length
                            as in dg.SamplerConfig
    tokens, pinned, allowed, start_step
                            as in dg.Canvas; -1 stands for None among tokens
    regex, json, choice     a grammar: a pattern, a schema, a list of texts; at most one
    thinking_budget         tokens after which the grammar lets no thought be open

vLLM's JSON of `vllm_xargs` holds numbers, texts and flat lists of these; what is nested goes as the text of its JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dgemma_ext import arguments
from dgemma_ext.checkpoint import GenerationDefaults
from dgemma_ext.sampling import Canvas, Choice, Grammar, JsonSchema, Regex, ResolvedSampler, SamplerConfig

_SAMPLER = (
    *("max_denoising_steps", "entropy_bound", "t_min", "t_max"),
    *("stability_threshold", "confidence_threshold", "canvas_length"),
)
_CANVAS = ("tokens", "pinned", "allowed", "start_step")
_GRAMMARS: dict[str, Callable[[Any], Grammar]] = {"regex": Regex, "json": JsonSchema, "choice": Choice}
WIDTH, ANSWERS = "diffusion_canvas_length", "dgemma_answers"
NAMES = ("seed", *_SAMPLER, *_CANVAS, *_GRAMMARS, "thinking_budget")

# Other parts of vLLM read these; what they mean is not ours to check.
_OF_VLLM = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
# Admission writes these for the other processes: what vLLM's scheduler calls canvas_length, and a request's n where the
# answers share a seed.
_OF_ADMISSION = (WIDTH, ANSWERS)
# What vLLM's own sampler is told, and what says it here.
_SPELT_HERE = {
    "diffusion_max_steps": "max_denoising_steps",
    "diffusion_seed_canvas": "tokens",
    "diffusion_pinned": "pinned",
    "diffusion_constrained": "allowed",
    WIDTH: "canvas_length",
}


@dataclass(frozen=True)
class RequestOptions:
    """A request's own settings; None where it has none."""

    sampler: SamplerConfig
    seed: int | None = None
    answers: int = 1  # that share the seed
    canvas: Canvas | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Limits:
    """What the model, and how it is served, let a request say. context: the most tokens of prompt and answer."""

    vocabulary: int
    canvas_length: int
    defaults: GenerationDefaults
    tensor_parallel: int = 1
    context: int | None = None


def options_of(extra_args: Mapping[str, Any] | None) -> RequestOptions:
    """Reads a request's extra_args. Raises ValueError naming the entry."""
    given = {name: value for name, value in (extra_args or {}).items() if value is not None}
    for name in given:
        if name not in NAMES and name not in _OF_VLLM and name not in _OF_ADMISSION:
            raise ValueError(unknown(name))
    sampler = SamplerConfig(**{name: given[name] for name in _SAMPLER if name in given})
    seed = arguments.integer("seed", given["seed"], end=2**63) if "seed" in given else None
    return RequestOptions(sampler, seed, int(given.get(ANSWERS, 1)), _canvas(given), _grammar(given))


def unknown(name: str) -> str:
    """Why an entry is refused."""
    if name in _SPELT_HERE:
        return f"extra_args has {name}, which vLLM's own sampler takes; {_SPELT_HERE[name]} says it here"
    if name.startswith("diffusion_"):
        return f"extra_args has {name}, which vLLM's own sampler takes and dgemma_ext's does not"
    return f"extra_args has {name}, which is not known; known are {', '.join(NAMES)}"


def check(options: RequestOptions, limits: Limits, max_tokens: int | None) -> ResolvedSampler:
    """Holds a request's options to the model, and fills in its defaults. Raises ValueError naming the entry."""
    sampler = options.sampler.resolve(limits.defaults, limits.canvas_length)
    canvas = options.canvas
    if canvas is not None:
        canvas.check(limits.vocabulary, sampler.max_denoising_steps)
        name, most = ("max_tokens", max_tokens) if max_tokens is not None else ("max_model_len", limits.context)
        room = None if most is None else -(-most // sampler.canvas_length) * sampler.canvas_length
        allowed = len(canvas.allowed or ()) if canvas.allows_by_position else 0
        for field, count in (("tokens", len(canvas.tokens)), ("allowed", allowed)):
            if room is not None and count > room:
                raise ValueError(
                    f"canvas.{field} has {count} entries, and the canvases of {name} {most} have {room} positions"
                )
    if options.grammar is not None and limits.tensor_parallel > 1:
        raise ValueError(
            f"a grammar wants tensor parallel 1, where a rank has the whole vocabulary, got {limits.tensor_parallel}"
        )
    return sampler


def _canvas(given: Mapping[str, Any]) -> Canvas | None:
    values = {name: _nested(name, given[name]) for name in _CANVAS if name in given}
    if not values:
        return None
    if "tokens" not in values and "pinned" in values:
        raise ValueError("pinned is for tokens, and there are none")
    if "tokens" in values:
        tokens = arguments.sequence("canvas.tokens", values["tokens"], "a sequence of token ids, -1 for noise")
        values["tokens"] = [None if type(token) is int and token == -1 else token for token in tokens]
    return Canvas(**values)


def _grammar(given: Mapping[str, Any]) -> Grammar | None:
    named = [name for name in _GRAMMARS if name in given]
    if len(named) > 1:
        raise ValueError(f"extra_args has {' and '.join(named)}, and an answer follows one grammar")
    if not named:
        if "thinking_budget" in given:
            raise ValueError(f"thinking_budget is for a grammar ({', '.join(_GRAMMARS)}), and there is none")
        return None
    value = given[named[0]]
    if named[0] == "choice":
        value = _nested("choice", value)
    try:
        found = _GRAMMARS[named[0]](value)
    except ValueError as error:
        raise ValueError(f"{named[0]}: {error}") from error
    return found.with_thinking_budget(given.get("thinking_budget"))


def _nested(name: str, value: Any) -> Any:
    """A value, or what the text of its JSON says."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name} must be a value or the text of its JSON, got {arguments.shown(value)}") from error
