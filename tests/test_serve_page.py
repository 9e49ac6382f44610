"""The page of `dgemma serve` over plain HTTP: its files, their headers, and what it asks of the server."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx2
import pytest

import dgemma_ext as dg
from dgemma_ext import demo, serve
from models import random_model
from serving import Running, bundled, running

FOLDER = Path(serve.__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/pictures.js": ("pictures.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(bundled()) as started:
        yield started


@pytest.mark.parametrize("path", FILES)
def test_a_file_comes_as_it_is(path: str, server: Running) -> None:
    name, media_type = FILES[path]
    answer = httpx2.get(server.url + path)
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] == media_type
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    again = httpx2.get(server.url + path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


class Addresses(HTMLParser):
    """The addresses, scripts and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []
        self.named: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag != "style", "the policy refuses inline styles"
        assert tag != "script" or given["src"], "the policy refuses inline scripts"
        assert not any(name == "style" or name.startswith("on") for name in given), given
        self.found += [given[name] or "" for name in ("src", "href") if name in given]
        self.ids += [given["id"] or ""] if "id" in given else []
        for name in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
            self.named += (given.get(name) or "").split()


def test_nothing_is_inline_or_from_elsewhere() -> None:
    html = Addresses()
    html.feed((FOLDER / "index.html").read_text(encoding="utf-8"))
    assert set(html.found) == {"page/page.css", "page/pictures.js", "page/page.js", "page/icon.svg", "#main"}
    assert len(html.ids) == len(set(html.ids))
    assert set(html.named) <= set(html.ids)
    texts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in ("page.js", "pictures.js", "page.css")}
    script = texts["page.js"] + texts["pictures.js"]
    for name, text in texts.items():
        addresses = re.findall(r"https?://[^\s\"')]+|url\(|@import", text)
        assert addresses == (["http://www.w3.org/2000/svg"] if name == "page.js" else []), name
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert unsafe not in script
    assert set(re.findall(r'\bat\("([\w-]+)"\)', script)) <= set(html.ids), "the script asks for elements that are not"


@pytest.mark.parametrize("name", ["page.js", "pictures.js"])
def test_the_script_parses(name: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    run = subprocess.run([node, "--check", str(FOLDER / name)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_facts_of_the_server(server: Running) -> None:
    facts = httpx2.get(f"{server.url}/page/facts").json()
    assert facts == {"version": dg.__version__, "needs_key": False, "sudoku": 6}


def test_another_model_has_no_puzzles() -> None:
    with running(random_model()) as server:
        assert httpx2.get(f"{server.url}/page/facts").json()["sudoku"] is None
        assert httpx2.get(f"{server.url}/page/sudoku").status_code == 404


def test_puzzles(server: Running) -> None:
    drawn = httpx2.get(f"{server.url}/page/sudoku?seed=5").json()
    puzzle = demo.draw(6, 5)
    assert drawn == {"size": 6, "seed": 5, "puzzle": puzzle.text, "solution": puzzle.solution}
    seeds = {httpx2.get(f"{server.url}/page/sudoku").json()["seed"] for _ in range(3)}
    assert len(seeds) > 1
    for seed in ("-1", "x", str(2**53)):
        refused = httpx2.get(f"{server.url}/page/sudoku?seed={seed}")
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "seed"


def test_the_page_is_open_and_what_costs_is_not() -> None:
    with running(bundled(), api_key="secret") as server:
        for path in (*FILES, "/page/facts"):
            assert httpx2.get(server.url + path).status_code == 200
        assert httpx2.get(f"{server.url}/page/facts").json()["needs_key"] is True
        assert httpx2.get(f"{server.url}/page/sudoku").status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert httpx2.get(f"{server.url}/page/sudoku", headers=headers).status_code == 200
