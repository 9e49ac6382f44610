"""From a prompt to what the passes take: token ids, and images with the places of their soft tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dgemma_ext import arguments
from dgemma_ext.checkpoint import LOCAL_KEYS, Message, ModelConfig, Tokenizer, images_of
from dgemma_ext.engine.served import ServedModel
from dgemma_ext.model.vision import SOFT_TOKENS, PromptImage, Vision

_WANTED = "a string, a chat or token ids"


@dataclass(frozen=True)
class PromptOptions:
    """How a prompt becomes token ids; what is None is left to the chat template.

    tools: JSON schemas of the functions that the model may call. enable_thinking: whether it thinks before it answers.
    chat_template_kwargs: other variables of the template. special_tokens: whether special tokens that are spelled in
    the prompt are "text" or "tokens". image_tokens: the most soft tokens that an image becomes, default the
    checkpoint's.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    special_tokens: str = "text"
    image_tokens: int | None = None

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


@dataclass(frozen=True)
class PlacedImage:
    """An image in a prompt. start: the position of its first soft token."""

    start: int
    image: PromptImage

    @property
    def end(self) -> int:
        return self.start + self.image.soft_tokens


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the passes take it; `tokenize_prompt` makes one.

    ids: an image is a token for its begin, `image_token_id` for each of its soft tokens, and a token for its end.
    images: in the order of their positions.
    """

    ids: list[int]
    images: tuple[PlacedImage, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def keys(self, vocab_size: int) -> list[int]:
        """What tells this prompt's tokens from another's: ids, and in place of an image's soft tokens integers of
        31 bits beyond the vocabulary, the words of its digest over and over."""
        keys = list(self.ids)
        for placed in self.images:
            words = np.frombuffer(placed.image.digest, np.uint32).astype(np.int64)
            of_image = vocab_size + words % (arguments.INT32_END - vocab_size)
            keys[placed.start : placed.end] = np.resize(of_image, placed.image.soft_tokens).tolist()
        return keys


# One message, a whole chat (role/content dicts), token ids, or a prompt that is tokenized already.
Prompt = str | Sequence[Message] | Sequence[int] | TokenizedPrompt


def tokenize_prompt(
    prompt: Prompt,
    model: ServedModel,
    name: str = "prompt",
    options: PromptOptions | None = None,
    images: Sequence[Any] | None = None,
    local_files: bool = True,
) -> TokenizedPrompt:
    """A prompt's token ids and images; text goes through the chat template.

    images: of a prompt that is a string, put before its text. local_files: whether a chat's images may be files of
    this machine; a server's clients' may not. Raises ValueError naming the argument, and ImportError for an image
    where Pillow is not installed.
    """
    options = options or PromptOptions()
    if isinstance(prompt, TokenizedPrompt):
        if images is not None or options != PromptOptions():
            raise ValueError(f"{name} is tokenized; options and images are for text")
        arguments.integers(name, prompt.ids, "token ids", end=model.network.config.vocab_size, entry="a token id")
        if prompt.images:
            _vision_of(model)
        return prompt
    chat: Any = prompt if images is None else with_images(name, prompt, images)
    ids, is_chat = _token_ids(chat, model.tokenizer, model.network.config.vocab_size, name, options)
    found = images_of(chat) if is_chat else []
    if not found:
        return TokenizedPrompt(ids)
    if images is not None:
        called = name.replace("prompt", "images")
        found = [(f"{called}[{index}]", key, source) for index, (_, key, source) in enumerate(found)]
    read = _read(found, _vision_of(model), options.image_tokens, local_files)
    return _expanded(ids, read, model.network.config)


def with_images(name: str, prompt: Any, images: Any) -> Any:
    """A string with images as a chat: one message of the user's, the images before the text."""
    sources = arguments.sequence("images", images, "a list of images")
    if not isinstance(prompt, str):
        raise ValueError(f"images are given, and {name} is no text; the images of a chat are parts of its messages")
    if not sources:
        return prompt
    parts: list[Any] = [{"type": "image", "image": source} for source in sources]
    return [{"role": "user", "content": [*parts, prompt]}]


def with_images_read(messages: Sequence[Message], model: ServedModel, image_tokens: int | None) -> list[Message]:
    """The messages with their images read, so that they do not depend on files and are not read again."""
    found = images_of(messages)
    if not found:
        return list(messages)
    read = iter(_read(found, _vision_of(model), image_tokens))
    made = []
    for message in messages:
        count = len(images_of([message]))
        if count:
            content = [
                {"type": "image", "image": next(read)} if images_of([{"content": [part]}]) else part
                for part in message["content"]
            ]
            message = {**message, "content": content}
        made.append(message)
    return made


def _vision_of(model: ServedModel) -> Vision:
    if model.vision is None:
        raise ValueError(
            "the prompt has an image, and the model has no vision tower: its checkpoint has none, or it was loaded "
            "with images=False"
        )
    return model.vision


def _read(
    found: Sequence[tuple[str, str, Any]], vision: Vision, image_tokens: int | None, local_files: bool = True
) -> list[PromptImage]:
    if image_tokens is not None and image_tokens not in SOFT_TOKENS:
        raise arguments.refusal("image_tokens", f"one of {', '.join(map(str, SOFT_TOKENS))} or None", image_tokens)
    read = []
    for name, key, source in found:
        if key in LOCAL_KEYS and not local_files and not isinstance(source, PromptImage):
            raise ValueError(f"{name} has {key}, and images are taken as data URLs alone")
        read.append(vision.read(name, source, image_tokens))
    return read


def _expanded(ids: Sequence[int], images: Sequence[PromptImage], config: ModelConfig) -> TokenizedPrompt:
    """The prompt with each image's token replaced by its begin, its soft tokens and its end."""
    begin, token, end = (_token_of(config, field) for field in ("boi_token_id", "image_token_id", "eoi_token_id"))
    if ids.count(token) != len(images):
        raise ValueError(f"the prompt has an image, and the tokenizer's token for one is not {token}, as config.json's")
    expanded: list[int] = []
    placed: list[PlacedImage] = []
    for one in ids:
        if one != token:
            expanded.append(one)
            continue
        image = images[len(placed)]
        placed.append(PlacedImage(len(expanded) + 1, image))
        expanded += [begin, *[token] * image.soft_tokens, end]
    return TokenizedPrompt(expanded, tuple(placed))


def _token_of(config: ModelConfig, field: str) -> int:
    value: int | None = getattr(config, field)
    if value is None or value >= config.vocab_size:
        raise ValueError(f"the prompt has an image, and config.json's {field} is {value}, which is no token")
    return value


def _token_ids(
    prompt: Any, tokenizer: Tokenizer | None, vocab_size: int, name: str, options: PromptOptions
) -> tuple[list[int], bool]:
    """The ids of a prompt, with one token for each image, and whether it is a chat."""
    is_chat = False
    if isinstance(prompt, str):
        if not arguments.text(name, prompt).strip():
            raise ValueError(f"{name} is empty")
        ids = _encoded(name, prompt, tokenizer, options)
    else:
        parts = arguments.sequence(name, prompt, _WANTED)
        is_chat = any(isinstance(part, Mapping) for part in parts)
        if not is_chat and options != PromptOptions():
            raise ValueError(f"{name} is token ids; tools, thinking, images and special_tokens are for text and chats")
        ids = _encoded(name, parts, tokenizer, options) if is_chat else parts
    if not ids:
        raise ValueError(f"{name} is empty")
    return arguments.integers(name, ids, "token ids", end=vocab_size, entry="a token id"), is_chat


def _encoded(name: str, prompt: Any, tokenizer: Tokenizer | None, options: PromptOptions) -> list[int]:
    if tokenizer is None:
        raise ValueError(f"{name} is text, and the checkpoint has no tokenizer.json; give token ids")
    variables = options.variables
    try:
        return tokenizer.encode_prompt(prompt, options.special_tokens, options.tools, **variables)
    except ValueError as error:
        if name == "prompt":
            raise
        raise ValueError(f"{name}: {error}") from error  # one of several prompts
