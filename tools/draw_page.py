"""Draws docs/page-sudoku.png and docs/page-chat.png: the page of `dgemma serve` with a bundled model, in a browser.

    python tools/draw_page.py            (needs playwright and Chromium)

Nothing is staged: the drafts are those of a running server, which the page's slider has gone back to.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright import sync_api

from dgemma_ext import demo

DOCS = Path(__file__).resolve().parent.parent / "docs"
SIZE = 9


@contextmanager
def server() -> Iterator[str]:
    """The address of a server that ends with the block."""
    command = [sys.executable, "-c", "from dgemma_ext.cli import main; main()", "serve", "demo", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield next(line["url"] for line in map(json.loads, process.stderr) if line["message"] == "serving")
        finally:
            process.terminate()


def settle(page: Any, name: str) -> None:
    """Waits until a button has its name again, and the mouse is nowhere."""
    sync_api.expect(page.get_by_role("button", name=name, exact=True)).to_be_visible(timeout=60_000)
    page.mouse.move(0, 0)


def go_back_to(page: Any, step: int) -> None:
    """Moves the visible slider to a step of the answer."""
    slider = page.get_by_role("slider").locator("visible=true")
    slider.press("Home")
    for _ in range(step - 1):
        slider.press("ArrowRight")
    slider.blur()
    page.wait_for_timeout(500)  # colours fade


def draw(url: str, browser: Any, puzzle: demo.Puzzle) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
    page.goto(url)
    page.locator(".cell.given").first.wait_for()
    page.get_by_role("button", name="Settings").click()
    page.locator("#set-seed").fill("1")
    page.locator("#set-pace").select_option("0")
    page.locator("#settings-close").click()
    page.evaluate("(cells) => sudoku.fill(cells)", [digit.strip(demo.puzzles.BLANK) for digit in puzzle.text])
    page.get_by_role("button", name="Solve").click()
    settle(page, "Solve")
    go_back_to(page, 2)
    page.screenshot(path=DOCS / "page-sudoku.png")

    page.emulate_media(color_scheme="dark")
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("Message", exact=True).fill(puzzle.text)
    page.keyboard.press("Enter")
    settle(page, "Send")
    page.get_by_role("button", name="Settings").click()
    go_back_to(page, 2)
    page.evaluate("() => document.activeElement.blur()")
    page.screenshot(path=DOCS / "page-chat.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--puzzle", type=int, default=1, help="the seed of the puzzle (default: %(default)s)")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with server() as url, sync_api.sync_playwright() as playwright:
        # As root, in containers, Chromium has no sandbox of its own.
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        draw(url, browser, demo.draw(SIZE, arguments.puzzle))
        browser.close()


if __name__ == "__main__":
    main()
