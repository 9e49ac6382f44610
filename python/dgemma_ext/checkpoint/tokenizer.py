"""Converts text to token ids and back, and chats to prompts, by tokenizer.json and the checkpoint's chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dgemma_ext import arguments
from dgemma_ext.checkpoint.chat_template import ChatTemplate
from dgemma_ext.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

# Gemma's special tokens, for a tokenizer_config.json that does not name them.
_SPECIAL_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}

Message = Mapping[str, Any]

_PROMPT = "a string, a list of messages or token ids"


class Tokenizer:
    """The checkpoint's tokenizer. `bos_token_id`, `eos_token_id`, `pad_token_id` are None where it has none."""

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._model = model
        self.special_tokens = {**_SPECIAL_TOKENS, **(special_tokens or {})}
        self.chat_template = chat_template
        self.bos_token_id = model.token_to_id(self.special_tokens["bos_token"])
        self.eos_token_id = model.token_to_id(self.special_tokens["eos_token"])
        self.pad_token_id = model.token_to_id(self.special_tokens["pad_token"])

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json where it exists, and the chat template: chat_template.jinja or,
        without that file, the template in tokenizer_config.json. Raises CheckpointError naming the file."""
        folder = Path(path)
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            raise CheckpointError("is missing", file=file)
        try:
            model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"cannot be read: {error}", file=file) from error
        # The file may keep truncation and padding from its last use; a prompt gets neither.
        model.no_truncation()
        model.no_padding()
        settings = _read_settings(folder / TOKENIZER_CONFIG_FILE)
        return cls(model, _special_tokens(settings), _find_template(folder, settings))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._model.get_vocab_size(with_added_tokens=True)

    def id_of(self, token: str) -> int:
        """The id of a token of the vocabulary; raises ValueError where there is none."""
        token_id = self._model.token_to_id(arguments.text("token", token))
        if token_id is None:
            raise ValueError(f"token is {token!r}, which is not in the vocabulary")
        return token_id

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of `text`. Special tokens that are written out in the text become their ids."""
        ids: list[int] = self._model.encode(arguments.text("text", text), add_special_tokens=False).ids
        if not arguments.flag("add_bos", add_bos):
            return ids
        if self.bos_token_id is None:
            raise ValueError(f"add_bos is set, but the vocabulary has no {self.special_tokens['bos_token']}")
        return [self.bos_token_id, *ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become the replacement character."""
        skips = arguments.flag("skip_special_tokens", skip_special_tokens)
        return self._model.decode(self._checked_ids("ids", ids), skip_special_tokens=skips)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Renders a chat to the model's prompt text, with its begin-of-sequence token.

        `messages`: mappings with "role" (system, developer, user, assistant, model or tool) and "content" (a string, or
        a list of {"type": "text", "text": ...}). `variables` go to the template, such as `enable_thinking` and
        `tools`. Raises ValueError for messages that cannot be rendered, CheckpointError for a template that fails.
        """
        if self.chat_template is None:
            raise ValueError("messages is a chat, but the checkpoint has no chat template; wanted: text or token ids")
        checked = _checked_messages(messages)
        return self.chat_template.render(
            {**self.special_tokens, "tools": None, **variables}
            | {"messages": checked, "add_generation_prompt": add_generation_prompt}
        )

    def encode_prompt(self, prompt: str | Sequence[Message] | Sequence[int], **variables: Any) -> list[int]:
        """Token ids of a prompt.

        A string is one user turn where there is a chat template; without one it follows the begin-of-sequence token. A
        chat goes through the template, which writes that token itself. A list of ids is used as it is.
        """
        if isinstance(prompt, str):
            arguments.text("prompt", prompt)
            if self.chat_template is None:
                return self.encode(prompt, add_bos=self.bos_token_id is not None)
            prompt = [{"role": "user", "content": prompt}]
        parts = arguments.sequence("prompt", prompt, _PROMPT)
        if not parts:
            raise arguments.refusal("prompt", _PROMPT, prompt)
        if any(isinstance(part, Mapping) for part in parts):
            return self.encode(self.apply_chat_template(parts, **variables))
        return self._checked_ids("prompt", parts)

    def _checked_ids(self, argument: str, ids: Sequence[int]) -> list[int]:
        return arguments.integers(argument, ids, "token ids", end=self.vocab_size, entry="a token id")


def _checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as plain dictionaries; raises ValueError naming the message and its error."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or len(messages) == 0:
        raise ValueError(f"messages is {messages!r}; wanted: a list of mappings with role and content")
    return [_checked_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


_ROLES = ("system", "developer", "user", "assistant", "model", "tool")


def _checked_message(name: str, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} is a {type(message).__name__}; wanted: a mapping with role and content")
    if message.get("role") not in _ROLES:
        raise ValueError(f"{name}['role'] is {message.get('role')!r}; wanted: one of {', '.join(_ROLES)}")
    content = message.get("content")
    is_tool_turn = bool(message.get("tool_calls") or message.get("tool_responses"))
    if isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(f"{name}['content'][{index}]", part)
    elif not isinstance(content, str) and not (content is None and is_tool_turn):
        raise ValueError(f"{name}['content'] is {content!r}; wanted: a string or a list of text parts")
    return dict(message)


def _check_part(name: str, part: Any) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        what = f"of type {kind!r}" if kind is not None else repr(part)
        raise ValueError(
            f'{name} is {what}; wanted: {{"type": "text", "text": ...}} (images and audio are not supported)'
        )
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{name}['text'] is {part.get('text')!r}; wanted: a string")


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read as JSON: {error}", file=file) from error
    if not isinstance(settings, dict):
        raise CheckpointError("is not a JSON object", file=file)
    return settings


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Every `…_token` of tokenizer_config.json, whose value is the text or an object that holds it."""
    tokens = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _find_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    file = folder / TEMPLATE_FILE
    if file.is_file():
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), file)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot be read: {error}", file=file) from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        # Of several named templates, "default" is the one for chats.
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}.get(
            "default"
        )
    return ChatTemplate(template, folder / TOKENIZER_CONFIG_FILE) if isinstance(template, str) else None
