"""A headless Chromium that looks at a page, and notes what a page must not do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

sync_api: Any = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements/dev.txt)")
expect = sync_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs Chromium (Debian: apt install chromium)", allow_module_level=True)

# Milliseconds that an expectation waits on a busy machine.
PATIENCE = 30_000
expect.set_options(timeout=PATIENCE)


@contextmanager
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # As root, in containers, Chromium has no sandbox of its own.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Faults:
    """What a page has done that it must not: errors in its console, and requests to other hosts."""

    def __init__(self, page: Any, url: str) -> None:
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        page.on("console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        host = urlsplit(url).netloc
        page.on("request", lambda request: urlsplit(request.url).netloc != host and self.elsewhere.append(request.url))


@contextmanager
def visiting(browser: Any, url: str, path: str = "/", errors: tuple[str, ...] = (), **options: Any) -> Iterator[Any]:
    """A page in a fresh context, with faults asserted away at the end. errors: beginnings of those that may come."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    faults = Faults(page, url)
    try:
        page.goto(url + path)
        yield page
    finally:
        context.close()
    assert [error for error in faults.errors if not error.startswith(errors or ("\0",))] == []
    assert faults.elsewhere == []
