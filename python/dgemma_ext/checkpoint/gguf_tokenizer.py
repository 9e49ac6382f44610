"""tokenizer.json, tokenizer_config.json and the chat template of what a GGUF file's metadata say."""

from __future__ import annotations

from typing import Any

from dgemma_ext.checkpoint.gguf_fields import Fields
from dgemma_ext.checkpoint.gguf_file import GgufFile
from dgemma_ext.checkpoint.special_tokens import is_marker
from dgemma_ext.errors import CheckpointError

_PREFIX = "tokenizer.ggml."
# Kinds of tokens, tokenizer.ggml.token_type (llama.h: llama_token_type).
_CONTROL, _USER_DEFINED = 3, 4
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token", "mask": "mask_token"}


def tokenizer_of(file: GgufFile) -> dict[str, Any]:
    """A tokenizer.json of the published kind: byte pairs, bytes for what has no token, a space as ▁, and a text that
    is cut behind words. Raises CheckpointError for a file without a tokenizer, and for one of another kind."""
    fields = Fields(file, _PREFIX)
    kind = fields.get("model")
    if kind is None:
        raise CheckpointError(f"has no tokenizer: {_PREFIX}model is missing", file=file.path)
    if kind != "gemma4":
        raise fields.error("model", "gemma4")
    fields.check("add_space_prefix", False)
    tokens, merges = (_list(file, name) for name in ("tokens", "merges"))
    types = [1] * len(tokens) if fields.get("token_type") is None else fields.entries("token_type", int, "integers")
    if len(types) != len(tokens):
        raise CheckpointError(f"{_PREFIX}token_type has {len(types)} entries for {len(tokens)} tokens", file=file.path)
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{_PREFIX}tokens has a token twice", file=file.path)
    pairs = [_pair(merge) for merge in merges]
    added = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL or is_marker(token),
        }
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    unknown = fields.index("unknown_token_id", len(tokens))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": pairs,
        },
    }


def tokenizer_config_of(file: GgufFile) -> dict[str, Any]:
    """A tokenizer_config.json: the texts of the tokens with a role."""
    tokens = _list(file, "tokens")
    fields = Fields(file, _PREFIX)
    named = {name: fields.index(f"{role}_token_id", len(tokens)) for role, name in _NAMED.items()}
    return {name: tokens[token_id] for name, token_id in named.items() if token_id is not None} | {
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def template_of(file: GgufFile) -> str | None:
    """The chat template; None where the file has none."""
    found = file.metadata.get("tokenizer.chat_template")
    return found if isinstance(found, str) and found else None


def _list(file: GgufFile, name: str) -> list[Any]:
    found = file.metadata.get(f"{_PREFIX}{name}")
    if not isinstance(found, list) or (name == "tokens" and not found):
        raise CheckpointError(f"has no tokenizer: {_PREFIX}{name} is missing", file=file.path)
    if any(type(entry) is not str for entry in found):
        raise Fields(file, _PREFIX).error(name, "texts")
    return found


def _pair(merge: str) -> list[str]:
    """The halves of a merge, written with a space between; a half may begin with one itself."""
    first, _, second = merge.partition(" ") if not merge.startswith(" ") else (" ", "", merge[2:])
    return [first, second]
