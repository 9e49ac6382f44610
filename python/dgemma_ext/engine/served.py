"""The model interface that the engine needs, and the conversion of prompts to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dgemma_ext import arguments
from dgemma_ext.checkpoint import GenerationDefaults, Message, Tokenizer
from dgemma_ext.model import Network

# One message, a whole chat (role/content dicts), or token ids.
Prompt = str | Sequence[Message] | Sequence[int]


class ServedModel(Protocol):
    """A network with its checkpoint's tokenizer and sampler defaults."""

    network: Network
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults


@dataclass(frozen=True)
class PromptOptions:
    """How a prompt becomes token ids; what is None is left to the chat template.

    tools: JSON schemas of the functions that the model may call. enable_thinking: whether it thinks before it answers.
    chat_template_kwargs: other variables of the template. special_tokens: whether special tokens that are spelled in
    the prompt are "text" or "tokens".
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    special_tokens: str = "text"

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the template. Raises ValueError for a name that has an argument of its own."""
        variables: dict[str, Any] = {}
        taken = {"messages", "tools", "add_generation_prompt", "special_tokens", "prompt", "self"}
        if self.enable_thinking is not None:
            variables["enable_thinking"] = arguments.flag("enable_thinking", self.enable_thinking)
            taken.add("enable_thinking")
        given = self.chat_template_kwargs
        if given is not None:
            if not isinstance(given, Mapping):
                raise arguments.refusal("chat_template_kwargs", "a mapping of names to values", given)
            for name in given:
                if arguments.text("a name of chat_template_kwargs", name) in taken:
                    raise ValueError(
                        f"chat_template_kwargs has {name}, which is an argument of its own, or not to be set"
                    )
            variables |= given
        return variables


def prompt_to_ids(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    name: str = "prompt",
    options: PromptOptions | None = None,
) -> list[int]:
    """Token ids of a prompt; text goes through the chat template. Raises ValueError naming the argument."""
    options = options or PromptOptions()
    if isinstance(prompt, str):
        if not arguments.text(name, prompt).strip():
            raise ValueError(f"{name} is empty")
        ids = _encoded(name, prompt, tokenizer, options)
    else:
        parts = arguments.sequence(name, prompt, "a string, a chat or token ids")
        is_chat = any(isinstance(part, Mapping) for part in parts)
        if not is_chat and options != PromptOptions():
            raise ValueError(f"{name} is token ids; tools, thinking and special_tokens are for text and chats")
        ids = _encoded(name, parts, tokenizer, options) if is_chat else parts
    if not ids:
        raise ValueError(f"{name} is empty")
    return arguments.integers(name, ids, "token ids", end=vocab_size, entry="a token id")


def _encoded(name: str, prompt: Prompt, tokenizer: Tokenizer | None, options: PromptOptions) -> list[int]:
    if tokenizer is None:
        raise ValueError(f"{name} is text, and the checkpoint has no tokenizer.json; give token ids")
    variables = options.variables
    try:
        return tokenizer.encode_prompt(prompt, options.special_tokens, options.tools, **variables)
    except ValueError as error:
        if name == "prompt":
            raise
        raise ValueError(f"{name}: {error}") from error  # one of several prompts
