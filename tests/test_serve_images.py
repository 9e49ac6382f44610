"""Images of the server's clients: the tokens of the engine, limits, and what is refused."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

import dgemma_ext as dg
from checkpoints import FULL, SLIDING
from dgemma_ext.serve.images import for_log
from models import random_model
from pictures import file_of, gradient
from serving import MODEL, Running, running
from tokenizer_files import IMAGE_TOKENS

WIDE, SQUARE = Image.fromarray(gradient(97, 61)), Image.fromarray(gradient(48, 48))  # 60 and 64 soft tokens of 70
FEWEST = {"max_soft_tokens": 70}
STEPS = {"max_denoising_steps": 2}
SAMPLER = dg.SamplerConfig(max_denoising_steps=2, trim_canvas=True)
LENGTH = 8


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    model = random_model(layers=(SLIDING, FULL), images=True, canvas=LENGTH, max_positions=512)
    with running(model, max_batch=4) as started:
        yield started
        started.wait_until_empty()


def url_of(image: Image.Image, format: str = "PNG") -> str:
    return f"data:image/png;base64,{base64.b64encode(file_of(image, format)).decode()}"


def chat_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url_of(image), "detail": "low"}}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def post(server: Running, path: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{server.url}{path}", json=body, timeout=60)


def ask(server: Running, messages: Any, seed: int = 0, **more: Any) -> Any:
    extra = {"diffusion": STEPS, "mm_processor_kwargs": FEWEST}
    return server.client().chat.completions.create(
        model=MODEL, messages=messages, seed=seed, max_tokens=LENGTH, extra_body=extra, **more
    )


def engines(server: Running, messages: Any, seed: int = 0) -> dg.Output:
    return server.model.generate(messages, LENGTH, SAMPLER, seed, image_tokens=70)  # type: ignore[no-any-return]


def test_a_chat_with_images(server: Running) -> None:
    """By OpenAI's client, whole and streamed; the prompt's tokens are counted with the images'."""
    messages = user("Look: ", chat_part(WIDE), chat_part(SQUARE), "What?")
    wanted = engines(server, messages)
    whole = ask(server, messages)
    stream = ask(server, messages, stream=True, stream_options={"include_usage": True})
    *chunks, last = stream
    assert whole.choices[0].message.content == wanted.text
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == wanted.text
    counted = post(server, "/tokenize", messages=messages, mm_processor_kwargs=FEWEST).json()
    assert counted["tokens"].count(IMAGE_TOKENS["<|image|>"]) == 60 + 64
    assert whole.usage.prompt_tokens == last.usage.prompt_tokens == counted["count"]


def test_the_usual_number_of_tokens(server: Running) -> None:
    for body, taken in (({}, 273), ({"mm_processor_kwargs": {}}, 273), ({"mm_processor_kwargs": FEWEST}, 60)):
        tokens = post(server, "/tokenize", messages=user(chat_part(WIDE)), **body).json()["tokens"]
        assert tokens.count(IMAGE_TOKENS["<|image|>"]) == taken


def test_responses_with_images(server: Running) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "What?"}, input_part(WIDE)]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A gradient."}]},
        {"role": "user", "content": [input_part(SQUARE), {"type": "input_text", "text": "And this?"}]},
    ]
    answer = server.client().responses.create(
        model=MODEL,
        input=items,  # type: ignore[arg-type]
        max_output_tokens=LENGTH,
        extra_body={"diffusion": STEPS, "seed": 0, "mm_processor_kwargs": FEWEST},
    )
    messages = [
        *user("What?", chat_part(WIDE)),
        {"role": "assistant", "content": "A gradient."},
        *user(chat_part(SQUARE), "And this?"),
    ]
    assert answer.output_text == engines(server, messages).text


def input_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url_of(image), "detail": "auto"}


def test_decisions_with_images(server: Running) -> None:
    body = {"messages": user(chat_part(WIDE), "Is it red?"), "choices": ["a", "b"], "mm_processor_kwargs": FEWEST}
    found = post(server, "/v1/decisions", **body).json()["data"][0]
    wanted = server.model.decide(user(chat_part(WIDE), "Is it red?"), ["a", "b"], image_tokens=70)
    assert found["probabilities"] == wanted.probabilities
    assert wanted.probabilities != server.model.decide(user("Is it red?"), ["a", "b"]).probabilities


def test_tokens_are_the_same_alone_in_a_batch_and_through_the_server(server: Running) -> None:
    """Seven requests, with one image, two and none."""
    one, two, none = (
        user(chat_part(WIDE), "What?"),
        user(chat_part(SQUARE), "and", chat_part(WIDE)),
        user("Why is the sky blue?"),
    )
    chats = [one, none, two, user("short"), one, user(chat_part(SQUARE)), two]
    alone = [engines(server, chat, seed) for seed, chat in enumerate(chats)]
    together = server.model.generate(chats, LENGTH, SAMPLER, list(range(7)), image_tokens=70)
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    with ThreadPoolExecutor(7) as pool:
        answers = list(pool.map(partial(ask, server), chats, range(7)))
    assert [answer.choices[0].message.content for answer in answers] == [output.text for output in alone]
    assert len({output.token_ids for output in alone}) == 7, "one answer for all would pass"


def test_neither_pixels_nor_the_tower_are_the_event_loop_s(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, set[str]] = {"read": set(), "features": set()}

    def noted(name: str, method: Any, *given: Any, **named: Any) -> Any:
        threads[name].add(threading.current_thread().name)
        return method(*given, **named)

    for name in ("read", "features"):
        monkeypatch.setattr(server.model.vision, name, partial(noted, name, getattr(server.model.vision, name)))
    ask(server, user(chat_part(Image.fromarray(gradient(50, 50)))))
    assert threads["features"] == {"dgemma-engine"}
    assert threads["read"]
    assert all(name.startswith("AnyIO worker thread") for name in threads["read"]), threads["read"]


def test_models_tell_what_they_take(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = server.client().models.list().data
    assert model.architecture == {"input_modalities": ["text", "image"], "output_modalities": ["text"]}  # type: ignore[attr-defined]
    monkeypatch.setattr(server.model, "vision", None)
    (model,) = server.client().models.list().data
    assert model.architecture["input_modalities"] == ["text"]  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError, match="takes no images: it has no vision tower") as caught:
        ask(server, user("a", chat_part(WIDE)))
    assert caught.value.param == "messages[0].content[1]"


# Refusals -------------------------------------------------------------------------------------------------------------


def bad_url(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


GOOD = url_of(SQUARE)
BAD: dict[str, tuple[Any, str]] = {
    "https": (
        bad_url("https://a.b/c.png"),
        r"has the URL 'https://a\.b/c\.png', which is not fetched; send a data URL",
    ),
    "http": (bad_url("http://127.0.0.1/"), "which is not fetched"),
    "file": (bad_url("file:///etc/passwd"), "which is not fetched"),
    "a path": ({"type": "image", "path": "/etc/passwd"}, "has path; images are taken as data URLs here"),
    "a path as an image": ({"type": "image", "image": "/etc/passwd"}, "has image; images are taken as data URLs"),
    "no URL": (bad_url(None), "must be a string"),
    "a file's id": ({"type": "input_image", "file_id": "file-1"}, "must be an image"),
    "not base64": (bad_url("data:image/png;base64,?"), "whose base64 cannot be decoded"),
    "no base64": (bad_url("data:image/png,abc"), "is a data URL without ;base64"),
    "text": (bad_url("data:image/png;base64,aGVsbG8="), "is no image in a format of PNG, JPEG, WEBP, GIF, BMP"),
    "another format": (bad_url(url_of(SQUARE, "PPM")), "is no image in a format of"),
    "cut off": (bad_url(GOOD[: len(GOOD) // 2 // 4 * 4]), "cannot be decoded"),
    "empty": (bad_url("data:image/png;base64,"), "is no image in a format of"),
}


@pytest.mark.parametrize("what", BAD)
def test_images_that_are_refused(server: Running, what: str) -> None:
    part, message = BAD[what]
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(server, [*user("a"), {"role": "assistant", "content": "b"}, *user("c", part)])
    assert caught.value.param == "messages[2].content[1]"
    assert "/etc/passwd" not in str(caught.value.body) or what == "file"
    answer = post(server, "/v1/responses", input=[{"role": "user", "content": [part]}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[0].content[0]")


def test_an_image_in_the_result_of_a_tool(server: Running) -> None:
    """It is held to the rules of others."""
    call = {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "1", "output": [{"type": "image", "path": "/etc/passwd"}]}
    answer = post(server, "/v1/responses", input=[{"role": "user", "content": "?"}, call, output])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[2].output[0]")


def test_limits(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, nbytes = server.service.options, len(file_of(WIDE))
    for limits, message, place in (
        ({"max_images": 1}, "a request may have 1 images here", "messages[0].content[1]"),
        ({"max_image_bytes": nbytes - 1}, f"file of more than {nbytes - 1} bytes", "messages[0].content[0]"),
        ({"max_image_pixels": 97 * 61 - 1}, "an image of more than 5,916 pixels", "messages[0].content[0]"),
    ):
        monkeypatch.setattr(server.service, "options", replace(usual, **limits))  # type: ignore[arg-type]
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            ask(server, user(chat_part(WIDE), chat_part(WIDE)))
        assert caught.value.param == place
    exact = {"max_images": 2, "max_image_bytes": nbytes, "max_image_pixels": 97 * 61}
    monkeypatch.setattr(server.service, "options", replace(usual, **exact))  # type: ignore[arg-type]
    assert ask(server, user(chat_part(WIDE), chat_part(WIDE))).usage.prompt_tokens > 120
    for settings, param in (
        ({"max_soft_tokens": 71}, "mm_processor_kwargs.max_soft_tokens"),
        ({"max_soft_tokens": True}, "mm_processor_kwargs.max_soft_tokens"),
        ({"size": 3}, "mm_processor_kwargs.size"),
    ):
        answer = post(server, "/v1/chat/completions", messages=user("a"), mm_processor_kwargs=settings)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_without_pillow(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(openai.BadRequestError, match=r"images need Pillow: pip install 'dgemma_ext\[images\]'"):
        ask(server, user(chat_part(WIDE)))


def test_a_client_s_path_is_not_read(server: Running, tmp_path: Path) -> None:
    """Where it is an image, too."""
    (tmp_path / "a.png").write_bytes(file_of(SQUARE))
    for key in ("path", "image"):
        answer = post(server, "/v1/chat/completions", messages=user({"type": "image", key: str(tmp_path / "a.png")}))
        assert answer.status_code == 400


def test_the_log_leaves_out_the_data_of_images() -> None:
    messages = user("data: is a word", chat_part(SQUARE))
    text, image = for_log(messages)[0]["content"]
    assert text == {"type": "text", "text": "data: is a word"}
    assert image["image_url"] == {"url": f"data:image/png;base64,... ({len(GOOD)} characters)", "detail": "low"}
