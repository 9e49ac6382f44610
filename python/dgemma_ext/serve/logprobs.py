"""Log-probabilities as OpenAI's interfaces spell them.

They are the engine's (sampling/logprobs.py): of each token given the canvas around it, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.serve.answer import NO_TEXT, TextToken


def chat_logprobs(tokens: Sequence[TextToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """The field `logprobs` of a chat's choice, for the tokens of its text."""
    content = [
        {
            **_token(tokenizer, one.id, one.logprobs.logprob),
            "top_logprobs": [
                _token(tokenizer, token, value)
                for token, value in zip(one.logprobs.top_ids, one.logprobs.top_logprobs, strict=True)
            ],
        }
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Iterable[TextToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """The field `logprobs` of a completion's choice."""
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in tokens:
        text = _text(tokenizer, one.id)
        best: dict[str, float] = {}
        for token, value in zip(one.logprobs.top_ids, one.logprobs.top_logprobs, strict=True):
            best.setdefault(_text(tokenizer, token), value)  # of tokens with one text the most probable
        found["tokens"].append(text)
        found["token_logprobs"].append(one.logprobs.logprob)
        found["top_logprobs"].append(best)
        found["text_offset"].append(one.offset)
    return found


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = _text(tokenizer, token)
    return {"token": text, "logprob": logprob, "bytes": None if NO_TEXT in text else list(text.encode())}


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False)
