"""Text, ids and chats: the tokenizer against transformers, and the chat template inside its sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from chats import texts
from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.errors import CheckpointError
from other_threads import turns_during
from tokenizer_files import CHAT_TEMPLATE, SPECIAL_TOKENS, write_tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello! "},
    {"role": "user", "content": [{"type": "text", "text": "the sky"}]},
]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"<b>": "ü & \\u2028"}}}


def nested(levels: int) -> Any:
    value: Any = "<"
    for _ in range(levels):
        value = [value]
    return value


def with_template(folder: Path, template: str | None) -> Tokenizer:
    write_tokenizer(folder, 512)
    if template is None:
        (folder / "chat_template.jinja").unlink()
    else:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.from_directory(folder)


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 512
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.id_of("<turn|>") == 106
    for token, token_id in SPECIAL_TOKENS.items():
        assert tokenizer.encode(token, special_tokens="tokens") == [token_id]
        assert tokenizer.decode([token_id]) == ""
        assert tokenizer.decode([token_id], skip_special_tokens=False) == token
    with pytest.raises(ValueError, match="token is '<no>'"):
        tokenizer.id_of("<no>")


def test_known_ids(tokenizer: Tokenizer) -> None:
    sky = tokenizer.encode("the sky")
    assert [tokenizer.decode([token_id]) for token_id in sky] == ["the", " ", "sky"]
    assert tokenizer.encode("the sky", add_bos=True) == [2, *sky]
    assert tokenizer.encode("") == []
    assert len(tokenizer.encode("é")) == 2  # two bytes


@settings(max_examples=100, deadline=None)
@given(text=texts())
def test_encoding_is_that_of_transformers_and_comes_back(
    tokenizer: Tokenizer, transformers_tokenizer: Any, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert ids == transformers_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # A space at the beginning of a word is written as ▁, so that sign comes back as a space.
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")
    assert not set(ids) & set(SPECIAL_TOKENS.values())
    assert (
        tokenizer.encode(text, special_tokens="tokens")
        == transformers_tokenizer(text, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize(
    ("messages", "variables"),
    [
        (CHAT[1:2], {}),
        (CHAT, {}),
        (CHAT, {"enable_thinking": True}),
        (CHAT, {"add_generation_prompt": False}),
        (CHAT, {"tools": [TOOL]}),
        (CHAT[1:], {"tools": [TOOL], "enable_thinking": True}),
    ],
)
def test_chats_render_as_in_transformers(
    tokenizer: Tokenizer, transformers_tokenizer: Any, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> None:
    options = {"add_generation_prompt": True} | variables
    text = tokenizer.apply_chat_template(messages, **options)
    assert text == transformers_tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert tokenizer.encode(text, special_tokens="tokens").count(2) == 1


def test_a_rendered_chat(tokenizer: Tokenizer) -> None:
    assert tokenizer.apply_chat_template(CHAT) == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n"
        "<|turn>model\nHello!<turn|>\n<|turn>user\nthe sky<turn|>\n<|turn>model\n"
    )


def test_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "the sky"}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(chat), special_tokens="tokens")
    assert tokenizer.encode_prompt("the sky") == tokenizer.encode_prompt(chat) == ids
    assert ids[:2] == [2, 105]
    assert 98 in tokenizer.encode_prompt("the sky", enable_thinking=True)
    assert tokenizer.encode_prompt([5, 6, 7]) == [5, 6, 7]
    assert tokenizer.encode_prompt([{**chat[0], "extra": nested(118)}]) == ids
    plain = with_template(tmp_path, None)
    assert plain.encode_prompt("the sky") == [2, *plain.encode("the sky")]
    with pytest.raises(ValueError, match="messages is a chat, but the checkpoint has no chat template"):
        plain.encode_prompt(chat)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "prompt must be a string"),
        (None, "prompt must be a string, .* got None"),
        (7, "prompt must be a string, .* got 7"),
        (b"x", "prompt must be a string"),
        ([1, 512], r"prompt\[1\] must be a token id in \[0, 512\), got 512"),
        ([-1], r"prompt\[0\] must be a token id in .* got -1"),
        ([True], r"prompt\[0\] must be a token id in .* got True"),
        ([1.0], r"prompt\[0\] must be a token id in .* got 1.0"),
        (["x"], r"prompt\[0\] must be a token id in .* got 'x'"),
        ([{"role": "user", "content": "x"}, 3], r"messages\[1\] must be a mapping with role and content, got 3"),
        ([{"content": "x"}], r"messages\[0\]\['role'\] must be one of .*, got None"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\]\['role'\] must be one of system, .*, got 'robot'"),
        ([{"role": "user"}], r"messages\[0\]\['content'\] must be .*, got None"),
        (
            [{"role": "user", "content": 3}],
            r"\['content'\] must be a string or a list of parts, .*, got 3",
        ),
        ([{"role": "user", "content": [7]}], r"messages\[0\]\['content'\]\[0\] must be text, .*, got 7"),
        ("\ud800 hi", r"prompt must be text that UTF-8 can hold, got a lone surrogate, '\\ud800', at character 0"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            r"\['content'\]\[0\] must be an image: .*, got {'type': 'image'}",
        ),
        ([{"role": "user", "content": [{"type": "audio"}]}], "got {'type': 'audio'}"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"\['content'\]\[0\]\['text'\] must be a string, got None"),
        ([{"role": "user", "content": "x", "extra": object()}], "messages is not plain data"),
        ([{"role": "user", "content": "x", "extra": float("nan")}], "messages is not plain data"),
        ([{"role": "user", "content": "x", "extra": nested(119)}], "messages is nested deeper than 120 levels"),
        ([{"role": "user", "content": "x", "extra": nested(9999)}], "messages is nested deeper than 120 levels"),
    ],
)
def test_bad_prompts_are_refused_by_name(tokenizer: Tokenizer, prompt: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tokenizer.encode_prompt(prompt)


def test_bad_arguments_are_refused_by_name(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="text must be a string, got 3"):
        tokenizer.encode(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ids\[1\] must be a token id .* got 600"):
        tokenizer.decode([1, 600])
    with pytest.raises(ValueError, match="messages must be a list of mappings with role and content, got 'x'"):
        tokenizer.apply_chat_template("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tools\[0\] must be the JSON schema .*, got <built-in function print>"):
        tokenizer.apply_chat_template(CHAT, tools=[print])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="special_tokens must be one of text, tokens, got 'yes'"):
        tokenizer.encode("x", special_tokens="yes")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ range.__globals__ }}",
        "{{ namespace(__class__='x') }}",
        "{% set box = namespace() %}{% set box.__class__ = 'x' %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ range(10000000) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum() }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, template: str) -> None:
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(CheckpointError, match="chat template") as caught:
        tokenizer.apply_chat_template(CHAT)
    assert caught.value.file == str(tmp_path / "chat_template.jinja")


def test_a_template_that_refuses_the_messages(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"messages: .*the system message must be the first"):
        tokenizer.apply_chat_template([CHAT[1], CHAT[0]])


def test_a_template_that_fails(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ 1 // 0 }}")
    with pytest.raises(CheckpointError, match="chat template: ZeroDivisionError") as caught:
        tokenizer.apply_chat_template(CHAT)
    assert caught.value.file == str(tmp_path / "chat_template.jinja")


def test_a_template_that_does_not_parse(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: chat template, line 2"):
        with_template(tmp_path, "\n{% if %}")


def test_functions_of_the_template_environment(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    template = """\
    {%- generation %}
    a
    {%- endgeneration %}
    {% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}
    {%- set box = namespace(n=1) %}{% set box.n = 2 %}{{ box.n }}{{ dict(b=1) }}
    {{- {'z': '<ü>', 'a': 1} | tojson }}{{ strftime_now('%%') }}{{ messages[0].missing is defined }}{{ eos_token }}
"""
    text = with_template(tmp_path, template).apply_chat_template(CHAT)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert text == theirs.apply_chat_template(CHAT, tokenize=False)
    assert text.strip() == "a012{'b': 1}" + '{"z": "<ü>", "a": 1}' + "%False<eos>"


def test_the_template_of_tokenizer_config_is_the_fallback(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 512)
    settings_file = tmp_path / "tokenizer_config.json"
    entries = [{"name": "rag", "template": "other"}, {"name": "default", "template": "named {{ bos_token }}"}]
    for template, expected in (("plain {{ bos_token }}", "plain <bos>"), (entries, "named <bos>")):
        values = {"chat_template": template, "bos_token": {"content": "<bos>", "special": True}}
        settings_file.write_text(json.dumps(values))
        (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        assert "<|turn>" in Tokenizer.from_directory(tmp_path).apply_chat_template(CHAT)
        (tmp_path / "chat_template.jinja").unlink()
        assert Tokenizer.from_directory(tmp_path).apply_chat_template(CHAT) == expected
    settings_file.write_text(json.dumps({"chat_template": "{{ ''.__class__ }}"}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat template"):
        Tokenizer.from_directory(tmp_path).apply_chat_template(CHAT)


@pytest.mark.parametrize(("name", "text"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "{")])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, text: str) -> None:
    write_tokenizer(tmp_path, 512)
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.from_directory(tmp_path)


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is missing"):
        Tokenizer.from_directory(tmp_path)


def test_settings_to_cut_or_pad_are_ignored(tmp_path: Path) -> None:
    import tokenizers

    write_tokenizer(tmp_path, 512)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.enable_truncation(2)
    model.enable_padding(length=4)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert len(tokenizer.encode("abcdef")) == 6
    assert len(tokenizer.encode("a")) == 1


@settings(max_examples=50)
@given(texts())
def test_long_texts_are_encoded_as_short_ones_are(tokenizer: Tokenizer, text: str) -> None:
    long = text + "the sky " * 512
    length = len(tokenizer.encode("the sky " * 512))
    assert tokenizer.encode(long)[:-length] == tokenizer.encode(text + "the sky ")[: -len(tokenizer.encode("the sky "))]
    assert tokenizer.decode(tokenizer.encode(long)) == tokenizer.decode(tokenizer.encode(text)) + "the sky " * 512


def test_other_threads_go_on_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    assert turns_during(lambda: tokenizer._ids_of("1" * 500_000)) > 100
