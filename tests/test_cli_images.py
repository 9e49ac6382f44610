"""The command's images: before a message, in a chat, beside a decision, and what is refused before weights are read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dgemma_ext as dg
from chats import prompts_of
from checkpoints import FULL, SLIDING
from command import CANVAS, dgemma, random_checkpoint
from dgemma_ext.cli import answer
from pictures import file_of, gradient
from tokenizer_files import IMAGE_TOKENS

TOKEN = IMAGE_TOKENS["<|image|>"]
SHORT = ["--max-new-tokens", str(CANVAS), "--steps", "1"]


@pytest.fixture(scope="module")
def checkpoint() -> str:
    return random_checkpoint(images=True, layers=(SLIDING, FULL), max_positions=512)


@pytest.fixture(scope="module")
def model(checkpoint: str) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(checkpoint)


@pytest.fixture(autouse=True)
def loaded(model: dg.DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Loads no weights; the arguments of from_pretrained."""
    asked: list[dict[str, object]] = []

    def load(*_: object, **named: object) -> dg.DiffusionGemma:
        asked.append(named)
        return model

    monkeypatch.setattr(answer.DiffusionGemma, "from_pretrained", load)
    return asked


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """60 and 64 soft tokens of 70."""
    folder = tmp_path_factory.mktemp("images")
    for name, size in (("a.png", (97, 61)), ("b.png", (48, 48))):
        (folder / name).write_bytes(file_of(Image.fromarray(gradient(*size))))
    return [str(folder / "a.png"), str(folder / "b.png")]


def parts(files: list[str], text: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": [*({"type": "image", "path": file} for file in files), text]}]


def test_images_before_a_message(
    checkpoint: str, model: dg.DiffusionGemma, files: list[str], loaded: list[dict[str, object]]
) -> None:
    flags = [word for file in files for word in ("--image", file)]
    run = dgemma("generate", checkpoint, "What?", *flags, "--image-tokens", "70", "--json", *SHORT)
    sampler = dg.SamplerConfig(max_denoising_steps=1)
    wanted = model.generate("What?", CANVAS, sampler, images=files, image_tokens=70)
    assert (run.code, run.object["token_ids"]) == (0, list(wanted.token_ids))
    assert loaded[-1]["images"] is True, "a checkpoint without a tower is refused before its weights are read"
    with_system = dgemma("generate", checkpoint, "What?", "--image", files[0], "--system", "Brief.", "--json", *SHORT)
    chat = [{"role": "system", "content": "Brief."}, *parts(files[:1], "What?")]
    assert with_system.object["token_ids"] == list(model.generate(chat, CANVAS, sampler).token_ids)


def test_flags_of_loading(checkpoint: str, loaded: list[dict[str, object]]) -> None:
    for flags, images, attention in (
        ([], "auto", "sliding"),
        (["--images", "on"], True, "sliding"),
        (["--images", "off", "--image-attention", "all"], False, "all"),
    ):
        assert dgemma("generate", checkpoint, "What?", *flags, *SHORT).code == 0
        assert (loaded[-1]["images"], loaded[-1]["image_attention"]) == (images, attention)


def test_a_decision_beside_an_image(checkpoint: str, model: dg.DiffusionGemma, files: list[str]) -> None:
    flags = ["--choice", "a", "--choice", "b", "--image", files[0], "--image-tokens", "70", "--json"]
    run = dgemma("decide", checkpoint, "Which?", *flags)
    wanted = model.decide("Which?", ["a", "b"], images=[files[0]], image_tokens=70)
    assert run.object["probabilities"] == wanted.probabilities


def test_images_in_a_chat(checkpoint: str, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They belong to the next message, stay in the conversation, and go with it."""
    seen = prompts_of(monkeypatch)
    lines = [f"/image {files[0]}", "What?", "And?", f"/image {files[0]}", f"/image {files[1]}", "Both?"]
    lines += [f"/image {files[1]}", "/reset", "None?"]
    run = dgemma("chat", checkpoint, "--image-tokens", "70", *SHORT, stdin="\n".join(lines) + "\n")
    assert run.code == 0, run.err
    assert [ids.count(TOKEN) for ids in seen] == [60, 60, 184, 0]
    assert run.err.count("(the image takes 60 tokens; it goes before the next message)") == 2


def test_a_turn_that_is_stopped_leaves_its_images(
    checkpoint: str, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the question had not been asked."""
    seen = prompts_of(monkeypatch)
    original = dg.Chat.stream

    def stopped(self: dg.Chat, text: str, *rest: Any, **named: Any) -> Iterator[dg.Draft | dg.Commit]:
        yield from itertools.islice(original(self, text, *rest, **named), 0 if text == "stop me" else None)

    monkeypatch.setattr(dg.Chat, "stream", stopped)
    lines = [f"/image {files[0]}", "stop me", "Again?", "And?"]
    run = dgemma("chat", checkpoint, "--image-tokens", "70", *SHORT, stdin="\n".join(lines) + "\n")
    assert "(stopped; the turn is taken back)" in run.err
    assert [ids.count(TOKEN) for ids in seen] == [60, 60]


BAD = {
    "no file": (["--image", "/nowhere/a.png"], "--image /nowhere/a.png cannot be read: "),
    "no image": (["--image", __file__], "is no image that Pillow can read"),
    "no tower": (["--image", "A", "--images", "off"], "--image needs the vision tower, which --images off leaves out"),
    "tokens": (["--image", "A", "--image-tokens", "71"], "argument --image-tokens: invalid choice: 71"),
    "a URL": (["--image", "https://a.b/c.png"], "is a URL, which is not fetched"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_refused_before_weights_are_read(
    checkpoint: str, files: list[str], loaded: list[dict[str, object]], what: str
) -> None:
    flags, message = BAD[what]
    run = dgemma("generate", checkpoint, "What?", *(files[0] if flag == "A" else flag for flag in flags))
    assert (run.code, message in run.err, loaded) == (2, True, []), run.err


def test_a_chat_refuses_an_image(
    checkpoint: str, model: dg.DiffusionGemma, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for line, message in (
        ("/image", "/image takes the path of an image"),
        ("/image /nowhere.png", "/image /nowhere.png cannot be read: "),
    ):
        run = dgemma("chat", checkpoint, stdin=f"{line}\n")
        assert (run.code, message in run.err) == (2, True), run.err
    monkeypatch.setattr(model, "vision", None)
    run = dgemma("chat", checkpoint, stdin=f"/image {files[0]}\n")
    assert (run.code, "or --images off left it out" in run.err) == (2, True)


def test_without_pillow(checkpoint: str, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    run = dgemma("generate", checkpoint, "What?", "--image", files[0])
    assert (run.code, run.err) == (2, "dgemma: images need Pillow: pip install 'dgemma_ext[images]'\n")


def test_a_checkpoint_without_a_tower(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    run = dgemma("generate", "demo", "What?", "--image", files[0])
    assert run.code == 2
    assert run.err.endswith("the vision tower is wanted, and the checkpoint has no vision tower\n")
    assert dgemma("generate", "demo", "62", "--images", "on").code == 2


def test_home_folders(checkpoint: str, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(files[0]).parent))
    assert dgemma("generate", checkpoint, "?", "--image", "~/a.png", "--image-tokens", "70", *SHORT).code == 0
