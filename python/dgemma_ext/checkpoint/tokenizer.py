"""Converts text to token ids and back, and chats to prompts, by tokenizer.json and the checkpoint's chat template."""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from dgemma_ext import arguments
from dgemma_ext.checkpoint.chat_template import ChatTemplate, json_value
from dgemma_ext.checkpoint.file_faults import read_file
from dgemma_ext.checkpoint.json_section import read_object
from dgemma_ext.checkpoint.messages import Message, checked_messages, checked_tools, images_of
from dgemma_ext.checkpoint.response import MARKERS, THOUGHT_MARKS, Part, Response, ResponseParser
from dgemma_ext.checkpoint.special_tokens import SpecialTokens, is_marker, make_masks, strings_of
from dgemma_ext.checkpoint.token_bytes import token_bytes
from dgemma_ext.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

# Gemma's special tokens, for a tokenizer_config.json that does not name them.
_SPECIAL_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}

# What a chat template writes where an image stands.
IMAGE_MARK = "<|image|>"

# How special tokens that are spelled in a text are encoded: as text like any other, or as those tokens.
_SPELLED = ("text", "tokens")

# Characters from which on a text is encoded as a batch of one. That leaves other threads Python's lock, which a single
# encoding keeps: a server answers meanwhile. For a million digits it took 0.13 s of processor time in place of 0.65. It
# starts threads, of which tokenizers warns in a process that forks later, so short texts, for which it gains 0.1 ms, do
# without.
_LONG = 4096

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
        # `_specials` finds them in a text; the model itself only those that its file does not call special.
        model.encode_special_tokens = True
        self._specials = _find_special_tokens(model, self.special_tokens, chat_template)
        self._special_ids = frozenset(self._specials.ids.values())
        self._parser = ResponseParser(self._specials.ids, self._decode)
        self.bos_token_id = model.token_to_id(self.special_tokens["bos_token"])
        self.eos_token_id = model.token_to_id(self.special_tokens["eos_token"])
        self.pad_token_id = model.token_to_id(self.special_tokens["pad_token"])
        unknown = model.token_to_id(self.special_tokens["unk_token"])
        self._never_of_text = self._special_ids - {unknown}
        bytes_by_name = (model.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._byte_ids = frozenset(token for token in bytes_by_name if token is not None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._model.encode_special_tokens = True  # a copy of a tokenizers.Tokenizer forgets it

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json where it exists, and the chat template: chat_template.jinja or,
        without that file, the template in tokenizer_config.json. Raises CheckpointError naming the file."""
        folder = Path(arguments.path("path", path))
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            raise CheckpointError("is missing", file=file)
        raw = read_file(file).removeprefix(codecs.BOM_UTF8)
        try:
            model = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"cannot be read: {error}", file=file) from error
        # The file may keep truncation and padding from its last use; a prompt gets neither.
        model.no_truncation()
        model.no_padding()
        settings = _read_settings(folder / TOKENIZER_CONFIG_FILE)
        return cls(model, _special_tokens(settings, folder / TOKENIZER_CONFIG_FILE), _find_template(folder, settings))

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens."""
        return self._special_ids

    @property
    def markers(self) -> Mapping[str, int]:
        """The special tokens: their ids by their text."""
        return self._specials.ids

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._model.get_vocab_size(with_added_tokens=True)

    @property
    def knows_thoughts(self) -> bool:
        """Whether the chat template spells the markers of thoughts: such a model may write an empty one untold."""
        return self.chat_template is not None and any(mark in self.chat_template.source for mark in THOUGHT_MARKS)

    def id_of(self, token: str) -> int:
        """The id of a token of the vocabulary; raises ValueError where there is none."""
        token_id = self._model.token_to_id(arguments.text("token", token))
        if token_id is None:
            raise ValueError(f"token is {token!r}, which is not in the vocabulary")
        return token_id

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each id writes; None for special tokens and unused ids. Raises ValueError for a decoder that
        is not known."""
        return token_bytes(self._model, self._special_ids)

    def encode(self, text: str, add_bos: bool = False, special_tokens: str = "text") -> list[int]:
        """Token ids of `text`.

        special_tokens: "text" encodes special tokens that are spelled in `text` as the characters that they are, and
        `decode` gives the same text back (but for the sign ▁, which Gemma's tokenizer takes for a space); "tokens"
        makes them tokens. The default is the same here as for chats, because a text that became a turn of its own
        would do so unseen, while a prompt whose markers stay text shows at once. transformers' default is "tokens".

        Raises ValueError naming the argument.
        """
        arguments.text("text", text)
        stays_text = arguments.choice("special_tokens", special_tokens, _SPELLED) == "text"
        ids = self._encode_text(text) if stays_text else self._encode_marked(text)
        if not arguments.flag("add_bos", add_bos):
            return ids
        if self.bos_token_id is None:
            raise ValueError(f"add_bos is set, but the vocabulary has no {self.special_tokens['bos_token']}")
        return [self.bos_token_id, *ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become the replacement character.

        Skipped are special tokens, and thoughts between their markers. What a tool call holds is kept with its string
        delimiters, without which it cannot be read; `parse_response` reads it.
        """
        checked = self._checked_ids("ids", ids)
        skips = arguments.flag("skip_special_tokens", skip_special_tokens)
        return self._parser.decode(checked) if skips else self._decode(checked, False)

    def parse_response(self, ids: Sequence[int], prefix: Sequence[int] = ()) -> Response:
        """An answer's text, thoughts and tool calls. `prefix` are the ids before it, which may have begun a thought."""
        return self._parser.parse(self._checked_ids("ids", ids), self._checked_ids("prefix", prefix))

    def settled(self, ids: Sequence[int]) -> list[int]:
        """The ids without those at their end whose text may be another one once more ids follow.

        Bytes that are tokens of their own are decoded together, special tokens between them left out: one that is still
        to come may make a character of the last of them, and without it all of them are replacement characters.
        """
        checked = self._checked_ids("ids", ids)
        end = last = len(checked)
        while last and (checked[last - 1] in self._byte_ids or checked[last - 1] in self._special_ids):
            last -= 1
            if checked[last] in self._byte_ids:
                end = last
        return checked[:end]

    def open_part(self, ids: Sequence[int]) -> list[int]:
        """The end of a prompt's ids, from the marker of a thought or a tool call that it leaves open; else empty."""
        return list(self._parser.open_part(self._checked_ids("ids", ids)))

    def thought_tokens(self, ids: Sequence[int], prefix: Sequence[int] = ()) -> int:
        """How many of an answer's ids belong to thoughts, with the markers around them."""
        return self._parser.parts(self._checked_ids("ids", ids), self._checked_ids("prefix", prefix)).count(
            Part.THOUGHT
        )

    def is_text(self, ids: Sequence[int], prefix: Sequence[int] = ()) -> list[bool]:
        """For each id of an answer whether it is part of `parse_response(ids, prefix).text`."""
        return self._parser.is_text(self._checked_ids("ids", ids), self._checked_ids("prefix", prefix))

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Renders a chat to the model's prompt text, with its begin-of-sequence token.

        `messages`: mappings with "role" (system, developer, user, assistant, model or tool) and "content" (a string, or
        a list of strings, of {"type": "text", "text": ...} and of images), as OpenAI's interfaces write them: an
        assistant's turn may have "tool_calls", and then the results follow in messages of the role tool, with
        "tool_call_id" or "name". `tools`: JSON schemas of functions. `variables` go to the template, such as
        `enable_thinking`.

        In the text nobody can tell the template's special tokens from those that a message spells; `encode_prompt` can.

        Raises ValueError for messages that cannot be rendered and for variables that the template does not read,
        CheckpointError for a template that fails.
        """
        return self._template().render(self._variables(messages, add_generation_prompt, tools, variables))

    def encode_prompt(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        special_tokens: str = "text",
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a prompt.

        A string is one user turn where there is a chat template; without one it follows the begin-of-sequence token. A
        chat goes through the template, which writes that token itself. A list of ids is used as it is. `tools` and
        `variables` are those of `apply_chat_template`.

        special_tokens: as in `encode`. With "text" only the template writes special tokens, whatever messages, tools
        and variables spell.

        An image of a chat becomes one `<|image|>`; the engine puts its soft tokens there. Raises ValueError where text
        spells that token, or the template leaves an image out.
        """
        arguments.choice("special_tokens", special_tokens, _SPELLED)
        parts: list[Any] = []
        if not isinstance(prompt, str):
            parts = arguments.sequence("prompt", prompt, _PROMPT)
        elif self.chat_template is not None:
            parts = [{"role": "user", "content": arguments.text("prompt", prompt)}]
        is_chat = any(isinstance(part, Mapping) for part in parts)
        if not is_chat and (tools is not None or variables):
            given = "tools" if tools is not None else next(iter(variables))
            raise ValueError(f"{given} is for a chat template, and the prompt does not go through one")
        if is_chat:
            checked = self._variables(parts, True, tools, variables)
            stays_text = special_tokens == "text"
            ids = self._encode_chat(checked) if stays_text else self._encode_marked(self._template().render(checked))
            self._check_images(ids, len(images_of(parts)))
            return ids
        if isinstance(prompt, str):
            ids = self.encode(prompt, self.bos_token_id is not None, special_tokens)
            self._check_images(ids, 0)
            return ids
        if not parts:
            raise arguments.refusal("prompt", _PROMPT, prompt)
        return self._checked_ids("prompt", parts)

    def _check_images(self, ids: Sequence[int], images: int) -> None:
        """Raises ValueError where a prompt's ids have another number of places for images than it has images."""
        mark = self._specials.ids.get(IMAGE_MARK)
        if mark is None and images:
            raise ValueError(f"messages have an image, and the tokenizer has no {IMAGE_MARK}")
        places = 0 if mark is None else ids.count(mark)
        if places > images:
            raise ValueError(f"the text of the prompt spells {IMAGE_MARK}, which stands for an image")
        if places < images:
            raise ValueError(f"the prompt has {images} images, and the chat template writes {places}")

    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ValueError("messages is a chat, but the checkpoint has no chat template; wanted: text or token ids")
        return self.chat_template

    def _variables(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The variables of the template as JSON data. Raises ValueError for those of which it takes no notice."""
        template = self._template()
        given = {"messages": checked_messages(messages), "tools": checked_tools(tools), **variables}
        for name in ["tools"] * bool(given["tools"]) + list(variables):
            # Leaving thoughts out is what a template without them does anyway.
            if not template.reads(name) and (name, given[name]) != ("enable_thinking", False):
                raise ValueError(f"{name} is given, but the chat template in {template.file} does not read it")
        if any("tool_calls" in message for message in given["messages"]) and "tool_calls" not in template.source:
            raise ValueError(f"messages have tool_calls, but the chat template in {template.file} does not read them")
        data = {name: json_value(name, value) for name, value in given.items()}
        return {**self.special_tokens, **data, "add_generation_prompt": add_generation_prompt}

    def _encode_chat(self, variables: dict[str, Any]) -> list[int]:
        """Token ids of a rendered chat, with special tokens where the template wrote them and nowhere else.

        Raises CheckpointError for a template that changes the characters that are masked, so that their text is lost.
        """
        template = self._template()
        trusted = {
            name: variables[name] for name in self.special_tokens if variables[name] == self.special_tokens[name]
        }
        untrusted = {name: value for name, value in variables.items() if name not in trusted}
        written = list(strings_of(untrusted))
        for token in self._specials.unmaskable:
            if any(token in text for text in written):
                raise ValueError(
                    f"messages spell the special token {token!r}, which cannot be told from the template's"
                )
        used = set().union(*written)
        masked = self._specials.edges & used
        now = datetime.now()
        # With other stand-ins the result is the same, unless the template does something to them.
        masks = make_masks(masked, used.union(template.source), 2 if masked else 1)
        rendered = [template.render(trusted | mask.hide(untrusted), now) for mask in masks]
        if len({mask.reveal(text) for mask, text in zip(masks, rendered, strict=True)}) > 1:
            raise CheckpointError(
                f"chat template: rewrites some of the characters {' '.join(sorted(masked))} of the messages, so that "
                "their text cannot be told from its own; special_tokens='tokens' takes both for the template's",
                file=template.file,
            )
        ids: list[int] = []
        for piece in self._specials.split(rendered[0]):
            ids += [piece] if isinstance(piece, int) else self._encode_text(masks[0].reveal(piece))
        return ids

    def _encode_marked(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._specials.split(text):
            ids += [piece] if isinstance(piece, int) else self._ids_of(piece)
        return ids

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._specials.cut(arguments.text("text", text)):
            ids += self._ids_of(piece)
        made = self._never_of_text.intersection(ids)
        if made:
            token = self._model.id_to_token(min(made))
            raise ValueError(f"text {arguments.shown(text)} cannot stay text: the tokenizer makes a {token} of it")
        return ids

    def _ids_of(self, text: str) -> list[int]:
        if len(text) < _LONG:
            return list(self._model.encode(text, add_special_tokens=False).ids)
        (encoding,) = self._model.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        shown = [token for token in ids if token not in self._special_ids] if skip_special_tokens else ids
        return self._model.decode(shown, skip_special_tokens=False)

    def _checked_ids(self, argument: str, ids: Sequence[int]) -> list[int]:
        return arguments.integers(argument, ids, "token ids", end=self.vocab_size, entry="a token id")


def _find_special_tokens(
    model: tokenizers.Tokenizer, named: Mapping[str, str], template: ChatTemplate | None
) -> SpecialTokens:
    """The added tokens that tokenizer.json calls special, and those that are used as such: the markers of answers,
    those that tokenizer_config.json names, and those that the chat template spells, set apart from words."""
    added = {token.content: (token_id, token.special) for token_id, token in model.get_added_tokens_decoder().items()}
    used = {text for text in added if text in MARKERS or text in named.values()}
    if template is not None:
        used |= {text for text in added if is_marker(text) and text in template.source}
    ids = {text: token_id for text, (token_id, is_special) in added.items() if is_special or text in used}
    return SpecialTokens(ids, found=[text for text in ids if not added[text][1]])


def _read_settings(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


def _special_tokens(settings: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Every `…_token` of tokenizer_config.json, whose value is the text or an object that holds it."""
    tokens = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = _checked_text(name, text, file)
    return tokens


def _checked_text(name: str, text: str, file: Path) -> str:
    """Raises CheckpointError for a JSON string with half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{name} is {text[:40]!r}, which is no text", file=file) from error
    return text


def _find_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    file = folder / TEMPLATE_FILE
    if file.is_file():
        try:
            # Without a byte order mark, which would be the first character of every prompt.
            return ChatTemplate(read_file(file).decode("utf-8-sig"), file)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"cannot be read: {error}", file=file) from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        # Of several named templates, "default" is the one for chats.
        named = (entry for entry in template if isinstance(entry, Mapping) and entry.get("name") == "default")
        template = next(named, {}).get("template")
    if not isinstance(template, str):
        return None
    source = folder / TOKENIZER_CONFIG_FILE
    return ChatTemplate(_checked_text("chat_template", template, source), source)
