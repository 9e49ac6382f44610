"""Drafts as clients get them."""

from __future__ import annotations

from typing import Any

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.engine import Draft
from dgemma_ext.serve.answer import Answer

# Of an entropy in nats; a draft has a number for each token.
_DECIMALS = 4


def draft_fields(draft: Draft, tokenizer: Tokenizer) -> dict[str, Any]:
    """A draft as JSON: what it would add to the answer, and for every position its token.

    canvas_index counts from 0 and step from 1; entropy is in nats; accepted tells which sampled tokens are kept for the
    next step; pinned, which positions the request holds.
    """
    pinned = pinned_positions(draft)
    columns = zip(draft.token_ids, draft.accepted.tolist(), draft.entropy.tolist(), pinned, strict=True)
    return {
        "type": "draft",
        "canvas_index": draft.canvas_index,
        "step": draft.step,
        "max_denoising_steps": draft.request.sampler.max_denoising_steps,
        "temperature": draft.request.sampler.temperature(draft.step),
        "mean_entropy": round(draft.mean_entropy, _DECIMALS),
        "text": draft.text,
        "thinking": draft.thinking,
        "tokens": [
            {
                "id": token,
                "text": tokenizer.decode([token], skip_special_tokens=False),
                "accepted": accepted,
                "entropy": round(entropy, _DECIMALS),
                **({"pinned": True} if is_pinned else {}),
            }
            for token, accepted, entropy, is_pinned in columns
        ],
    }


def pinned_positions(draft: Draft) -> list[bool]:
    """Which positions of a draft's canvas are pinned."""
    length, canvas = len(draft.token_ids), draft.request.canvas
    begin = draft.canvas_index * draft.request.sampler.canvas_length
    pinned = [] if canvas is None else list(canvas.pinned or ())[begin : begin + length]
    return [*pinned, *[False] * (length - len(pinned))]


def whole_text(answer: Answer, draft: Draft) -> str:
    """The answer's text with a draft's in place of what is still to come."""
    return answer.text + draft.text
