"""The tokenizer and chat template of the small checkpoints: 384 tokens that can spell any UTF-8 text.

The special tokens that generation depends on have the ids of the published DiffusionGemma tokenizer; the rest is one
token per printable ASCII character, the 256 byte tokens (`<0x00>` ...) for everything else, and the role names.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE

VOCABULARY_SIZE = 384

SPECIAL_TOKENS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
    "<|image>": 381,
    "<|image|>": 382,
    "<image|>": 383,
}
NEWLINE_ID = 107

# The turn format of the published template (bos, turns of role and trimmed text, "model" for the assistant); tools and
# images are left out.
CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content | trim -}}
    {%- else -%}
        {%- for part in content or [] -%}{{- part['text'] | trim -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set thinking = '<|think|>\\n' if enable_thinking is defined and enable_thinking else '' -%}
{%- set has_system = messages and messages[0]['role'] in ['system', 'developer'] -%}
{%- if thinking or has_system -%}
    {{- '<|turn>system\\n' + thinking + (text_of(messages[0]['content']) if has_system else '') + '<turn|>\\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' + text_of(message['content']) + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""

_MERGED_WORDS = ("user", "model", "system")


def build() -> Tokenizer:
    """A byte-fallback BPE tokenizer whose only merges spell the role names."""
    vocabulary = dict(SPECIAL_TOKENS) | {"\n": NEWLINE_ID}
    merges: list[tuple[str, str]] = []
    pieces = [chr(code) for code in range(32, 127)] + [f"<0x{byte:02X}>" for byte in range(256)]
    for word in _MERGED_WORDS:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            pieces.append(word[: end + 1])
    free = iter(sorted(set(range(VOCABULARY_SIZE)) - set(vocabulary.values())))
    for piece in pieces:
        if piece not in vocabulary:
            vocabulary[piece] = next(free)
    unused = [(f"<unused{index}>", token) for index, token in enumerate(free)]
    vocabulary |= dict(unused)

    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    specials = sorted(list(SPECIAL_TOKENS.items()) + unused, key=lambda item: item[1])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text, _ in specials])
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE, tokenizer.get_vocab_size()
    assert all(tokenizer.token_to_id(text) == token for text, token in SPECIAL_TOKENS.items())
    return tokenizer


def save(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    build().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
