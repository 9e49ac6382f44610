"""Images on the page of `dgemma serve`: chosen, dropped and pasted, shown, taken off, and sent."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import page_visits
from browser import expect, visiting
from checkpoints import FULL, SLIDING
from models import random_model
from page_visits import ask, finished, setting
from pictures import file_of, gradient
from serving import Running, running

browser, sudoku = page_visits.browser, page_visits.sudoku
CONSOLE_400 = "Failed to load resource: the server responded with a status of 400"
DATA = file_of(Image.fromarray(gradient(48, 48)))
URL = f"data:image/png;base64,{base64.b64encode(DATA).decode()}"
# Files as an event brings them: its class, where it happens, its property, the files' names and types.
GIVE = """([kind, place, property, files, data]) => {
  const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
  const given = new DataTransfer();
  for (const [name, type] of files) given.items.add(new File([bytes], name, { type }));
  const Event = property === "dataTransfer" ? DragEvent : ClipboardEvent;
  const event = new Event(kind, { [property]: given, bubbles: true, cancelable: true });
  document.querySelector(place).dispatchEvent(event);
  return event.defaultPrevented;
}"""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(random_model(layers=(SLIDING, FULL), images=True, canvas=8, max_positions=1024)) as started:
        yield started


def give(page: Any, kind: str, place: str, *names: str, type: str = "image/png") -> bool:
    of_event = "clipboardData" if kind == "paste" else "dataTransfer"
    data = base64.b64encode(DATA).decode()
    return page.evaluate(GIVE, [kind, place, of_event, [[name, type] for name in names], data])  # type: ignore[no-any-return]


def chosen(page: Any) -> Any:
    return page.get_by_role("list", name="Images of the next message").get_by_role("img")


def test_images_by_button_drop_and_paste(browser: Any, server: Running, tmp_path: Path) -> None:
    (tmp_path / "chosen.png").write_bytes(DATA)
    with visiting(browser, server.url, "/#chat") as page:
        setting(page, max_denoising_steps=1, max_tokens=8)
        bodies: list[Any] = []
        page.on("request", lambda one: "completions" in one.url and bodies.append(json.loads(one.post_data)))
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Add images").click()
        chooser.value.set_files(tmp_path / "chosen.png")
        expect(chosen(page)).to_have_count(1)
        assert give(page, "dragover", "#log", "dropped.png"), "the browser would open it"
        assert give(page, "drop", "#log", "dropped.png", "second.png")
        expect(chosen(page)).to_have_count(3)
        assert give(page, "paste", "#message", "pasted.png")
        expect(chosen(page)).to_have_count(4)
        assert [one.get_attribute("alt") for one in chosen(page).all()] == [
            "chosen.png",
            "dropped.png",
            "second.png",
            "pasted.png",
        ]
        expect(page.get_by_role("status").first).to_have_text("pasted.png is added.")
        for name in ("Remove second.png", "Remove dropped.png"):
            page.get_by_role("button", name=name).click()
        expect(chosen(page)).to_have_count(2)
        assert page.evaluate("() => document.activeElement.id") == "message"

        ask(page, "What are these?")
        finished(page)
        assert page.locator("#notice").is_hidden()
        assert page.locator("#pictures").is_hidden()
        turn = page.locator(".message.user")
        assert [one.get_attribute("alt") for one in turn.get_by_role("img").all()] == ["chosen.png", "pasted.png"]
        assert all(one.evaluate("(one) => one.naturalWidth") == 48 for one in turn.get_by_role("img").all())
        part = {"type": "image_url", "image_url": {"url": URL}}
        assert bodies[0]["messages"][-1]["content"] == [part, part, {"type": "text", "text": "What are these?"}]

        assert give(page, "paste", "#message", "alone.png")
        expect(chosen(page)).to_have_count(1)
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".message.model")).to_have_count(2)
        finished(page)
        first, _, last = bodies[1]["messages"]
        assert first == bodies[0]["messages"][-1], "the conversation keeps its images"
        assert last["content"] == [part]
        page.get_by_role("button", name="New chat").click()
        assert page.get_by_role("img").count() == 0


def test_images_that_are_refused_come_back(browser: Any, server: Running) -> None:
    with visiting(browser, server.url, "/#chat", errors=(CONSOLE_400,)) as page:
        expect(page.get_by_role("button", name="Add images")).to_be_visible()
        give(page, "drop", "#log", "notes.txt", type="text/plain")
        expect(page.locator("#notice-text")).to_contain_text("notes.txt is no image")
        assert chosen(page).count() == 0
        page.locator("#notice-close").click()
        for index in range(17):  # one more than the server takes
            give(page, "paste", "#message", f"{index}.png")
        expect(chosen(page)).to_have_count(17)
        ask(page, "All?")
        expect(page.locator("#notice-text")).to_contain_text("a request may have 16 images here")
        expect(chosen(page)).to_have_count(17)
        assert page.get_by_label("Message", exact=True).input_value() == "All?"
        assert page.locator(".message").count() == 0


def test_a_model_without_a_tower(browser: Any, sudoku: Running) -> None:
    """What is dropped is left to the browser."""
    with visiting(browser, sudoku.url, "/#chat") as page:
        expect(page.get_by_role("button", name="New chat")).to_be_visible()
        assert page.get_by_role("button", name="Add images").count() == 0
        assert not give(page, "dragover", "#log", "a.png")
