"""A small tokenizer of the published kind with its chat template, for tests."""

from __future__ import annotations

import json
from pathlib import Path

# Tokens with the ids that they have in the published tokenizer.
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
}

# Those of images; their published ids are beyond the vocabularies of tests.
IMAGE_TOKENS = {"<|image>": 501, "<|image|>": 500, "<image|>": 502}

# The format of the published template in short: turns, thoughts since the last question, tools, calls and results.
CHAT_TEMPLATE = """\
{%- macro value_of(value) -%}
    {%- if value is none -%}
        null
    {%- elif value is string -%}
        {{ '<|"|>' + value + '<|"|>' }}
    {%- elif value is boolean -%}
        {{ 'true' if value else 'false' }}
    {%- elif value is mapping -%}
        {{ '{' }}{{ members_of(value) }}{{ '}' }}
    {%- elif value is sequence -%}
        [{% for item in value %}{{ value_of(item) }}{{ ',' if not loop.last }}{% endfor %}]
    {%- else -%}
        {{ value }}
    {%- endif -%}
{%- endmacro -%}
{%- macro members_of(value) -%}
    {%- for key, item in value | dictsort %}{{ key }}:{{ value_of(item) }}{{ ',' if not loop.last }}{% endfor -%}
{%- endmacro -%}
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{ content | trim }}
    {%- else -%}
        {%- for part in content -%}
            {{ '<|image|>' if part['type'] == 'image' else part['text'] | trim }}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- set first_is_system = messages and messages[0]['role'] == 'system' -%}
{%- if enable_thinking or tools or first_is_system -%}
    {{ '<|turn>system\\n' }}
    {%- if enable_thinking %}{{ '<|think|>\\n' }}{% endif -%}
    {%- if first_is_system %}{{ text_of(messages[0]['content']) }}{% endif -%}
    {%- for tool in tools or [] -%}
        {{ '<|tool>declaration:' + tool['function']['name'] + '{' + members_of(tool['function']) + '}<tool|>' }}
    {%- endfor -%}
    {{ '<turn|>\\n' }}
{%- endif -%}
{%- set last = namespace(user=-1, role='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- if not loop.first %}{{ raise_exception('the system message must be the first') }}{% endif -%}
        {%- continue -%}
    {%- elif message['role'] == 'tool' -%}
        {{ '<|tool_response>response:' + message['name'] + '{value:' }}
        {{- value_of(message['content']) + '}<tool_response|>' }}
    {%- else -%}
        {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
        {%- if last.role != 'tool' %}{{ '<|turn>' + role + '\\n' }}{% endif -%}
        {%- if message['reasoning_content'] and loop.index0 > last.user -%}
            {{ '<|channel>thought\\n' + message['reasoning_content'] + '\\n<channel|>' }}
        {%- endif -%}
        {%- for call in message['tool_calls'] or [] -%}
            {{ '<|tool_call>call:' + call['function']['name'] + '{' }}
            {{- members_of(call['function']['arguments']) + '}<tool_call|>' }}
        {%- endfor -%}
        {{ text_of(message['content']) }}
        {%- if not message['tool_calls'] %}{{ '<turn|>\\n' }}{% endif -%}
    {%- endif -%}
    {%- set last.role = message['role'] -%}
{%- endfor -%}
{%- if add_generation_prompt and last.role != 'tool' -%}
    {{ '<|turn>model\\n' }}
{%- elif add_generation_prompt and enable_thinking -%}
    {{ '<|channel>thought\\n' }}
{%- endif -%}
"""


def write_tokenizer(directory: Path, vocabulary: int, images: bool = False) -> None:
    """Writes a small tokenizer.json of the published kind (BPE with byte fallback, spaces as ▁) and a chat template.

    Ids: the special tokens where the published tokenizer has them, a newline at 107, 256 bytes, printable ASCII, a few
    words, then unused entries up to `vocabulary`. images: with IMAGE_TOKENS, for which it takes 503 entries.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    special = SPECIAL_TOKENS | (IMAGE_TOKENS if images else {})
    ids = dict(special)
    ids["\n"] = 107
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"] + [chr(code) for code in range(33, 127)]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("u", "s"), ("us", "e"), ("use", "r"), ("s", "k"), ("sk", "y")]
    pieces += ["".join(pair) for pair in merges]
    if vocabulary < 108 + len(pieces):
        raise ValueError(f"a tokenizer takes a vocabulary of at least {108 + len(pieces)}, got {vocabulary}")
    ids |= {piece: 108 + i for i, piece in enumerate(pieces)}
    taken = set(ids.values())
    ids |= {f"<unused{i}>": i for i in range(vocabulary) if i not in taken}

    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "GemmaTokenizer", **tokens}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
