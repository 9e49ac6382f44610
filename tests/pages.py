"""The Markdown pages, taken apart for the tests that run what they show.

A fenced block in python, sh or c is code; a block in text right behind it is what the code prints, where "..." stands
for anything. A comment <!-- not run: reason --> in front of a block leaves it unexecuted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *GUIDES]
_ELSEWHERE = {".git", ".venv", "build", "node_modules"}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NOT_RUN = re.compile(r"<!-- not run: .+ -->\n\Z")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int  # of the first line of code, from 1
    is_run: bool
    prints: str | None


@dataclass(frozen=True)
class Command:
    """One line of a shell block: [NAME=value ...] program words, with what `echo` or `printf` pipes into it."""

    line: str
    environment: dict[str, str]
    words: list[str]
    stdin: str
    is_run: bool
    prints: str | None


def every_page() -> list[Path]:
    """Every Markdown file of the repository."""
    return sorted(p for p in ROOT.rglob("*.md") if not _ELSEWHERE.intersection(p.relative_to(ROOT).parts))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(text))
    made = []
    for index, match in enumerate(found):
        following = found[index + 1] if index + 1 < len(found) else None
        shown = following is not None and following[1] == "text" and not text[match.end() : following.start()].strip()
        made.append(
            Block(
                language=match[1],
                text=match[2],
                line=text.count("\n", 0, match.start()) + 2,
                is_run=_NOT_RUN.search(text[: match.start()]) is None,
                prints=following[2] if shown and following is not None else None,
            )
        )
    return made


def blocks_in(page: Path, language: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == language]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path, program: str) -> list[Command]:
    """The lines of shell blocks that run `program`. What a block prints belongs to its last line."""
    found = []
    for block in blocks_in(page, "sh"):
        lines = [line for line in block.text.replace("\\\n", " ").splitlines() if line and line[0] != "#"]
        for index, line in enumerate(lines):
            prints = block.prints if index == len(lines) - 1 else None
            command = _parsed(line, block.is_run, prints)
            if command.words[:1] == [program]:
                found.append(command)
    return found


def _parsed(line: str, is_run: bool, prints: str | None) -> Command:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|")
    lexer.whitespace_split = True
    words = list(lexer)
    stdin = ""
    if "|" in words:
        pipe = words.index("|")
        stdin, words = _printed(words[:pipe]), words[pipe + 1 :]
    environment = {}
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    return Command(line, environment, words, stdin, is_run, prints)


def _printed(words: list[str]) -> str:
    """What `echo` or `printf` makes of its words."""
    if words[:1] == ["echo"]:
        return " ".join(words[1:]) + "\n"
    if words[:1] == ["printf"] and len(words) == 2:
        return words[1].replace("\\n", "\n")
    return ""


def links(page: Path) -> Iterator[str]:
    """Targets of the page's links into this repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target and not target.startswith("mailto:"):
            yield target


def anchors(page: Path) -> set[str]:
    """What a link into the page may name, as GitHub spells it."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
