"""What answers took, for the `usage` of a reply."""

from __future__ import annotations

from typing import Any

from dgemma_ext.serve.call import Call


def usage_of(call: Call) -> dict[str, Any]:
    """Tokens of a call, a prompt of several choices counted once; steps and canvases of all answers."""
    prompts = {id(one.prompt_ids): len(one.prompt_ids) for one in call.submissions}
    prompt_tokens = sum(prompts.values())
    cached: dict[int, int] = {}
    for one, answer in zip(call.submissions, call.answers, strict=True):
        key = id(one.prompt_ids)
        cached[key] = min(answer.cached_tokens, cached.get(key, answer.cached_tokens))
    completion_tokens = sum(len(answer.token_ids) for answer in call.answers)
    steps = sum(sum(answer.denoising_steps) for answer in call.answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        "completion_tokens_details": {"reasoning_tokens": sum(answer.reasoning_tokens for answer in call.answers)},
        "diffusion": {
            "denoising_steps": steps,
            "canvases": sum(len(answer.denoising_steps) for answer in call.answers),
            "tokens_per_forward": round(completion_tokens / max(1, steps), 4),
            "seeds": [one.seed for one in call.submissions],
        },
    }


def choice_diffusion(call: Call, index: int) -> dict[str, Any]:
    """How an answer came about."""
    answer = call.answers[index]
    return {
        "seed": call.submissions[index].seed,
        "denoising_steps": answer.denoising_steps,
        "finish_reason": answer.engine_reason,
    }
