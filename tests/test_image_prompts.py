"""Prompts with images on their way to tokens: content parts, places of soft tokens, keys, and what is refused."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dgemma_ext as dg
from chats import prompts_of
from checkpoints import FULL, SLIDING
from dgemma_ext.engine import TokenizedPrompt, tokenize_prompt
from models import random_model
from pictures import file_of, gradient
from tokenizer_files import IMAGE_TOKENS

BEGIN, TOKEN, END = (IMAGE_TOKENS[text] for text in ("<|image>", "<|image|>", "<image|>"))
SAMPLER = dg.SamplerConfig(max_denoising_steps=2)
WIDE, SQUARE = Image.fromarray(gradient(97, 61)), Image.fromarray(gradient(48, 48))  # 60 and 64 soft tokens of 70


@pytest.fixture(scope="module")
def model() -> dg.DiffusionGemma:
    return random_model(layers=(SLIDING, FULL), images=True)


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def image(**source: Any) -> dict[str, Any]:
    return {"type": "image", **source}


def tokenized(model: dg.DiffusionGemma, prompt: Any, **named: Any) -> TokenizedPrompt:
    return tokenize_prompt(prompt, model, options=dg.PromptOptions(image_tokens=70), **named)


# Places ---------------------------------------------------------------------------------------------------------------


def test_an_image_takes_its_soft_tokens_between_begin_and_end(model: dg.DiffusionGemma) -> None:
    prompt = tokenized(model, user("a", image(image=WIDE), image(image=SQUARE), "b"))
    first, second = prompt.images
    ids = model.tokenizer.encode_prompt(user("a<|image|><|image|>b"), special_tokens="text")  # type: ignore[union-attr]
    assert TOKEN not in ids, "a user's text is no image"
    where = prompt.ids.index(BEGIN)
    assert prompt.ids[where : where + 128] == [BEGIN, *[TOKEN] * 60, END, BEGIN, *[TOKEN] * 64, END]
    assert [(one.start, one.end) for one in prompt.images] == [(where + 1, where + 61), (where + 63, where + 127)]
    without = prompt.ids[:where] + prompt.ids[where + 128 :]
    assert without == model.tokenizer.encode_prompt(user("a", "b"))  # type: ignore[union-attr]
    assert first.image.digest != second.image.digest
    assert len(prompt) == len(without) + 128


@pytest.mark.parametrize(("soft_tokens", "taken"), [(None, 273), (70, 60), (140, 126)])
def test_the_most_soft_tokens_of_an_image(model: dg.DiffusionGemma, soft_tokens: int | None, taken: int) -> None:
    """280 where neither the prompt nor the checkpoint says."""
    prompt = tokenize_prompt("?", model, options=dg.PromptOptions(image_tokens=soft_tokens), images=[WIDE])
    assert prompt.ids.count(TOKEN) == taken


def test_every_form_of_an_image_is_the_same_prompt(model: dg.DiffusionGemma, tmp_path: Path) -> None:
    data = file_of(WIDE)
    (tmp_path / "a.png").write_bytes(data)
    encoded = base64.b64encode(data).decode()
    url = f"data:image/png;base64,{encoded}"
    forms: list[dict[str, Any]] = [
        image(path=tmp_path / "a.png"),
        image(path=str(tmp_path / "a.png"), image=None),
        image(image=data),
        image(base64=encoded),
        image(url=url),
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url, "detail": "auto"},
    ]
    expected = tokenized(model, "What?", images=[WIDE])
    for form in forms:
        prompt = tokenized(model, user(form, "What?"))
        assert prompt.ids == expected.ids
        assert prompt.keys(512) == expected.keys(512)


def test_a_prompt_s_keys_tell_its_images_apart(model: dg.DiffusionGemma) -> None:
    turned = WIDE.transpose(Image.Transpose.ROTATE_180)
    one, same, other = (tokenized(model, "?", images=[picture]) for picture in (WIDE, WIDE.copy(), turned))
    assert one.ids == other.ids
    assert one.keys(512) == same.keys(512) != other.keys(512)
    start, end = one.images[0].start, one.images[0].end
    assert one.keys(512)[:start] + one.keys(512)[end:] == one.ids[:start] + one.ids[end:]
    for prompt in (one, other):
        words = prompt.keys(512)[start:end]
        assert all(512 <= word < 2**31 for word in words)
        assert len(set(words)) == 8, "all of the digest"


# Arguments ------------------------------------------------------------------------------------------------------------


def test_images_of_a_string_and_of_a_batch(model: dg.DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = prompts_of(monkeypatch)
    model.generate("What?", 4, SAMPLER, images=[WIDE, SQUARE], image_tokens=70)
    model.generate(["a", "b"], 4, SAMPLER, images=[None, [SQUARE]], image_tokens=[None, 140])
    model.decide("What?", ["a", "b"], images=[SQUARE], image_tokens=70)
    next(model.stream("What?", 4, SAMPLER, images=[SQUARE], image_tokens=70))
    assert seen[0] == tokenized(model, user(image(image=WIDE), image(image=SQUARE), "What?")).ids
    assert [ids.count(TOKEN) for ids in seen] == [124, 0, 121, 64, 64]


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no list": ("a", {"images": "a.png"}, r"images must be a list of images, got 'a\.png'"),
    "of ids": ([5, 6], {"images": [WIDE]}, "images are given, and prompt is no text"),
    "of a chat": (user("a"), {"images": [WIDE]}, "the images of a chat are parts of its messages"),
    "too few": (["a", "b"], {"images": [[WIDE]]}, "images must be one value or 2, one per prompt, got 1"),
    "what is none": ("a", {"images": [WIDE, 3]}, r"images\[1\] must be a path, .* got 3"),
    "None": ("a", {"images": [None]}, r"must be an image: .*, got {'image': None, 'type': 'image'}"),
    "of a batch": (["a", "b"], {"images": [None, [b""]]}, r"images\[1\]\[0\] is no image that Pillow can read"),
    "a number of tokens": (
        "a",
        {"images": [WIDE], "image_tokens": 71},
        "image_tokens must be one of 70, 140, ",
    ),
    "tokens of ids": ([5], {"image_tokens": 70}, "prompt is token ids; tools, thinking, images"),
    "two keys": (user(image(path="a", url="data:,")), {}, r"\[0\]\['content'\]\[0\] must be an image"),
    "no file": (user(image(path="/nowhere.png")), {}, r"\['content'\]\[0\] cannot be read: .*No such file"),
    "an address": (user(image(url="https://a.b/c.png")), {}, "has the URL 'https://a.b/c.png', which is not fetched"),
    "a path as URL": (user(image(url="/etc/passwd")), {}, "has the URL '/etc/passwd', which is not fetched"),
    "base64": (user(image(base64="?")), {}, "whose base64 cannot be decoded"),
    "no text": (user(image(base64=b"abcd")), {}, r"\['base64'\] must be a string"),
    "audio": (user({"type": "input_audio"}), {}, r"or an image \(audio and video are not supported\)"),
    "spelled": ("<|image|>", {"special_tokens": "tokens"}, r"the text of the prompt spells <\|image\|>"),
    "spelled too": ("<|image|>", {"special_tokens": "tokens", "images": [WIDE]}, r"of the prompt spells <\|image\|>"),
    "long": (
        "a",
        {"images": [Image.new("RGB", (20_000, 1))], "image_tokens": 70},
        r"images\[0\]: the image has 210 ",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_images_that_are_refused(model: dg.DiffusionGemma, what: str) -> None:
    prompt, named, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, 4, **named)


def test_a_template_that_leaves_images_out(model: dg.DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    template = tokenizer.chat_template
    assert template is not None
    plain = type(template)(template.source.replace("'<|image|>' if part['type'] == 'image' else ", ""), template.file)
    monkeypatch.setattr(tokenizer, "chat_template", plain)
    with pytest.raises(ValueError, match="the prompt has 1 images, and the chat template writes 0"):
        tokenized(model, "a", images=[WIDE])


def test_models_that_take_no_images(model: dg.DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"messages have an image, and the tokenizer has no <\|image\|>"):
        random_model().generate("a", 4, images=[SQUARE])
    config = model.network.config
    monkeypatch.setattr(model.network, "config", replace(config, eoi_token_id=512))
    with pytest.raises(ValueError, match=r"config\.json's eoi_token_id is 512, which is no token"):
        tokenized(model, "a", images=[SQUARE])
    monkeypatch.setattr(model.network, "config", replace(config, image_token_id=7))
    with pytest.raises(ValueError, match="the tokenizer's token for one is not 7"):
        tokenized(model, "a", images=[SQUARE])
    monkeypatch.setattr(model, "vision", None)
    with pytest.raises(ValueError, match=r"the model has no vision tower: .* loaded with images=False"):
        tokenized(model, "a", images=[SQUARE])


def test_a_tokenized_prompt_of_another_model(model: dg.DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tokenized(model, "a", images=[SQUARE])
    with pytest.raises(ValueError, match="prompt is tokenized; options and images are for text"):
        model.generate(prompt, image_tokens=70)
    with pytest.raises(ValueError, match=r"prompt\[1\] must be a token id in \[0, 512\), got 512"):
        model.generate(TokenizedPrompt([2, 512]))
    monkeypatch.setattr(model, "vision", None)
    with pytest.raises(ValueError, match="the model has no vision tower"):
        model.generate([prompt, "b"])


def test_images_of_a_server_s_clients_are_no_files(model: dg.DiffusionGemma, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file_of(SQUARE))
    for part in (image(path=str(tmp_path / "a.png")), image(image=str(tmp_path / "a.png"))):
        with pytest.raises(ValueError, match="and images are taken as data URLs alone"):
            tokenized(model, user(part), local_files=False)
