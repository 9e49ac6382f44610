"""Drafts as clients get them."""

from __future__ import annotations

from typing import Any

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.engine import Draft
from dgemma_ext.serve.answer import Answer

# Of an entropy in nats; a draft has a number for each token.
_DECIMALS = 4


def draft_fields(draft: Draft, answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    """A draft of an answer as JSON: what it would add to it, and for every position its token.

    canvas_index counts from 0 and step from 1; end is how many of the tokens the answer would keep; entropy is in nats;
    accepted tells which sampled tokens are kept for the next step; pinned, which positions the request holds; ends,
    which token is the end of the text.
    """
    pinned, end = pinned_positions(draft), answer.end_of(draft)
    last = end - 1 if draft.token_ids[end - 1] in draft.request.sampler.eos_token_ids else None
    columns = zip(draft.token_ids, draft.accepted.tolist(), draft.entropy.tolist(), pinned, strict=True)
    return {
        "type": "draft",
        "canvas_index": draft.canvas_index,
        "step": draft.step,
        "max_denoising_steps": draft.request.sampler.max_denoising_steps,
        "temperature": draft.request.sampler.temperature(draft.step),
        "mean_entropy": round(draft.mean_entropy, _DECIMALS),
        "text": answer.text_of(draft),
        "end": end,
        "thinking": draft.thinking,
        "tokens": [
            {
                "id": token,
                "text": tokenizer.decode([token], skip_special_tokens=False),
                "accepted": accepted,
                "entropy": round(entropy, _DECIMALS),
                **({"pinned": True} if is_pinned else {}),
                **({"ends": True} if place == last else {}),
            }
            for place, (token, accepted, entropy, is_pinned) in enumerate(columns)
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
    return answer.text + answer.text_of(draft)
