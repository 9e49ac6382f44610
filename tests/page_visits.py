"""What the tests of the server's page share: the servers behind it, and what a visitor does on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from browser import chromium, expect
from dgemma_ext import demo
from models import random_model
from serving import Running, bundled, running

SIZE = 6
PUZZLE = demo.draw(SIZE, seed=5)  # of few clues: it takes several steps, and some seeds do not solve it
EASY = demo.draw(SIZE, seed=17)
# Counts what the page builds and changes while an answer comes, and notes what a screen reader is told.
WATCH = """() => {
  window.seen = { built: 0, changed: 0, texts: new Set(), said: [] };
  const live = document.getElementById("log");
  new MutationObserver((records) => {
    for (const record of records) {
      const home = record.target.parentElement?.closest(".canvas");
      if (record.target.className === "canvas" && record.addedNodes.length) seen.built += record.addedNodes.length;
      else if (home) seen.changed++;
    }
    const canvas = live.querySelector(".canvas");
    if (canvas?.textContent) seen.texts.add(canvas.textContent);
  }).observe(live, { childList: true, characterData: true, attributes: true, subtree: true });
  const status = document.getElementById("status");
  new MutationObserver(() => seen.said.push(status.textContent)).observe(status, { childList: true });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def sudoku() -> Iterator[Running]:
    with running(bundled(SIZE)) as started:
        yield started


@pytest.fixture(scope="module")
def text() -> Iterator[Running]:
    """A model with a vocabulary of text, whose answers the tests pin."""
    with running(random_model(canvas=32, max_positions=1024)) as started:
        yield started


def drafts_of(server: Running, messages: Any, seed: int) -> tuple[list[Any], str]:
    """The drafts of an answer and its text, without the page."""
    body = {"messages": messages, "seed": seed, "stream": True, "diffusion": {"drafts": True, "entropy_bound": 0.01}}
    lines = httpx2.post(f"{server.url}/v1/chat/completions", json=body).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    return [chunk["diffusion"] for chunk in chunks if chunk.get("diffusion")], text


def setting(page: Any, **values: Any) -> None:
    """Fills in settings, and closes them again."""
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        field = page.locator(f"#set-{name}")
        field.select_option(value) if name in ("pace", "thinking") else field.fill(str(value))
    page.locator("#settings-close").click()


def ask(page: Any, message: str) -> None:
    page.get_by_label("Message", exact=True).fill(message)
    page.keyboard.press("Enter")


def finished(page: Any) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def figures(view: Any) -> dict[str, str]:
    return dict(zip(view.locator("dt").all_inner_texts(), view.locator("dd").all_inner_texts(), strict=True))


def steady(page: Any) -> None:
    """The same answers in every run, each step shown for a moment."""
    page.evaluate("() => { settings.fields.seed.value = 1; settings.pace = () => 20; }")


def put_puzzle(page: Any, puzzle: str) -> None:
    expect(page.locator(".cell.given").nth(5)).to_be_visible()
    page.evaluate("(cells) => sudoku.fill(cells)", [digit.strip(".") for digit in puzzle])


def digits(page: Any) -> str:
    return "".join(page.get_by_role("gridcell").all_inner_texts())
