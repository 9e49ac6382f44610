"""From a request to what the engine is asked for: one submission for each prompt and choice."""

from __future__ import annotations

from collections.abc import Sequence

from dgemma_ext.engine import TokenizedPrompt
from dgemma_ext.sampling import Grammar, SamplerConfig
from dgemma_ext.serve import errors
from dgemma_ext.serve.job_runner import Submission
from dgemma_ext.serve.protocol.common import GeneratingBody
from dgemma_ext.serve.protocol.diffusion import DiffusionOptions
from dgemma_ext.serve.service import Service
from dgemma_ext.serve.steering import canvas_of, sampler_of, seeds_of


async def submissions_of(
    service: Service,
    body: GeneratingBody,
    prompts: Sequence[TokenizedPrompt],
    max_tokens: int | None,
    field: str,
    grammar: Grammar | None = None,
) -> list[Submission]:
    """The submissions of a request: for every prompt its choices, whose seeds follow each other. Raises ApiError.

    Without max_tokens an answer may have as many as the checkpoint's default says and a slot holds. `field` names the
    prompts in errors.
    """
    service.engine.check_count(len(prompts), body.choices)
    options = body.diffusion or DiffusionOptions()
    if (options.drafts or body.diffusing) and not body.stream:
        raise errors.bad_request(
            "drafts are sent in a stream; set stream as well", "diffusing" if body.diffusing else "diffusion.drafts"
        )
    try:
        sampler = sampler_of(body.temperature, options, service.model.defaults, service.options.trim_canvas)
    except ValueError as error:
        raise errors.from_value_error(error, "diffusion") from error
    longest = service.model.config.max_position_embeddings
    canvas = await service.in_thread("diffusion.start_text", canvas_of, options, service.tokenizer, longest)
    seeds = seeds_of(body.seed, body.temperature, body.choices)
    wants_drafts = options.drafts or body.diffusing
    deadline = None if options.deadline_ms is None else options.deadline_ms / 1000
    adapter = service.adapter_of(body.model)
    return [
        Submission(
            prompt, limit, sampler, seed, canvas, wants_drafts, body.alternatives, deadline, grammar, adapter=adapter
        )
        for prompt in prompts
        for limit in [usual_limit(service, len(prompt), sampler, field) if max_tokens is None else max_tokens]
        for seed in seeds
    ]


def usual_limit(service: Service, prompt_tokens: int, sampler: SamplerConfig, field: str) -> int:
    """The tokens that an answer may have where the request does not say: the checkpoint's default, or what fits.

    Raises ApiError, with both numbers, for a prompt that leaves no room for a canvas.
    """
    config = service.model.config
    length = min(sampler.canvas_length or config.canvas_length, config.canvas_length)
    in_slot = service.engine.scheduler.cache.max_length - prompt_tokens
    in_context = config.max_position_embeddings - prompt_tokens
    # A slot holds every canvas but the last.
    canvases = min(in_slot // length + 1 if in_slot >= 0 else 0, max(0, in_context) // length)
    if canvases < 1:
        longest = min(service.engine.scheduler.cache.max_length, config.max_position_embeddings - length)
        raise errors.bad_request(
            f"the prompt has {prompt_tokens} tokens, and at most {longest} leave room for an answer here",
            field,
            "context_length_exceeded",
        )
    return min(service.model.defaults.max_new_tokens, canvases * length)
