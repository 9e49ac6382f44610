"""The model interface that the engine needs, and the conversion of prompts to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from dgemma_ext import arguments
from dgemma_ext.checkpoint import GenerationDefaults, Tokenizer
from dgemma_ext.model import Network

# One message, a whole chat (role/content dicts), or token ids.
Prompt = str | Sequence[dict[str, object]] | Sequence[int]


class ServedModel(Protocol):
    """A network with its checkpoint's tokenizer and sampler defaults."""

    network: Network
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults


def prompt_to_ids(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, name: str = "prompt") -> list[int]:
    """Token ids of a prompt; text goes through the chat template. Raises ValueError naming the argument."""
    if isinstance(prompt, str):
        if not arguments.text(name, prompt).strip():
            raise ValueError(f"{name} is empty")
        ids = _with_text(name, tokenizer).encode_prompt(prompt)
    else:
        parts = arguments.sequence(name, prompt, "a string, a chat or token ids")
        is_chat = any(isinstance(part, Mapping) for part in parts)
        ids = _with_text(name, tokenizer).encode_prompt(parts) if is_chat else parts
    if not ids:
        raise ValueError(f"{name} is empty")
    return arguments.integers(name, ids, "token ids", end=vocab_size, entry="a token id")


def _with_text(name: str, tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(f"{name} is text, and the checkpoint has no tokenizer.json; give token ids")
    return tokenizer
