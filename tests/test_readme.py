"""What the README shows is run: its Python, and the commands that it names."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from dgemma_ext import demo
from dgemma_ext.cli.arguments import build_parser

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_interface_in_twenty_lines_runs() -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line]) <= 20
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    lines = out.getvalue().splitlines()
    puzzle = demo.draw(size=6, seed=1)
    assert lines[0].startswith(f"{puzzle.solution} eos ")
    assert lines[-2] == "True"
    assert lines[-1].count("'") == 2 * 6


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines() if "dgemma" in line])
def test_the_commands_are_accepted(line: str) -> None:
    _, _, command = line.partition("dgemma ")
    words = re.findall(r'"[^"]*"|[^\s"]+', command.partition("#")[0].partition("|")[0])
    build_parser().parse_args([word.strip('"') for word in words])


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (Path(__file__).resolve().parent.parent / target).exists(), target
