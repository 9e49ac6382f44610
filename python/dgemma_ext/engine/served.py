"""The model interface that the engine needs, and the conversion of prompts to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from dgemma_ext.checkpoint import GenerationDefaults, Tokenizer
from dgemma_ext.model import Network

# One message, a whole chat (role/content dicts), or token ids.
Prompt = str | Sequence[dict[str, object]] | Sequence[int]


class ServedModel(Protocol):
    """A network with its checkpoint's tokenizer and sampler defaults."""

    network: Network
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults


def prompt_to_ids(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """Token ids of a prompt; text goes through the chat template. Raises ValueError naming the argument."""
    if not isinstance(prompt, str) and all(isinstance(part, int) for part in prompt):
        ids = list(cast(Sequence[int], prompt))
    elif tokenizer is None:
        raise ValueError("prompt is text, and the checkpoint has no tokenizer.json; give token ids")
    elif isinstance(prompt, str) and not prompt.strip():
        raise ValueError("prompt is empty")
    else:
        ids = tokenizer.encode_prompt(cast(Any, prompt))
    if not ids:
        raise ValueError("prompt is empty")
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(f"prompt[{position}] must be a token id in [0, {vocab_size}), got {token}")
    return ids
