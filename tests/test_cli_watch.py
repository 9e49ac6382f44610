"""Pictures of a canvas: the colour scale, the drawing in a terminal, and control characters in a model's text."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from rich.color import Color
from rich.console import Console

import dgemma_ext as dg
from command import ESCAPE, library_model, random_checkpoint, started
from dgemma_ext.cli import palette
from dgemma_ext.cli.grid import plain_grid
from dgemma_ext.cli.watch import Watch, canvas_picture, status_line, visible


def lightness(colour: str) -> float:
    """CIELAB's L* of an sRGB colour, in [0, 100]."""
    triplet = Color.parse(colour).get_truecolor()
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in triplet)]
    return 116 * (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]) ** (1 / 3) - 16


def test_the_scale_is_ordered_in_lightness_by_even_steps() -> None:
    assert len(palette.COLOURS) == len(palette.BOUNDS) + 1
    levels = [lightness(palette.entropy_colour(entropy)) for entropy in (0.0, *palette.BOUNDS)]
    steps = [brighter - darker for brighter, darker in pairwise(levels)]
    assert min(steps) > 7
    assert max(steps) < 10
    assert levels[-1] - lightness(palette.BACKGROUND) > 20
    assert palette.entropy_colour(12.5) == palette.COLOURS[-1]


def drafts(**fields: object) -> list[dg.Draft]:
    model = library_model()
    kept: list[dg.Draft] = []
    model.generate("the sky", max_new_tokens=8, on_draft=kept.append, **fields)  # type: ignore[arg-type]
    return kept


def drawn(draft: dg.Draft, **console: object) -> str:
    tokenizer = library_model().tokenizer
    assert tokenizer is not None
    stream = io.StringIO()
    Console(file=stream, width=100, **console).print(canvas_picture(draft, tokenizer))  # type: ignore[arg-type]
    return stream.getvalue()


def test_a_picture_shows_entropy_by_colour_and_acceptance_by_underline() -> None:
    steps = drafts(sampler=dg.SamplerConfig(max_denoising_steps=6, confidence_threshold=0.0))
    for draft in steps:
        picture = drawn(draft, force_terminal=True, color_system="truecolor")
        assert status_line(draft) in re.sub(r"\x1b\[[\d;]*m", "", picture)
        body = picture.splitlines()[2:]
        for entropy in draft.entropy.tolist():
            red, green, blue = Color.parse(palette.entropy_colour(entropy)).get_truecolor()
            assert f"38;2;{red};{green};{blue}" in picture
        assert ("\x1b[4;" in "".join(body)) == bool(draft.accepted.any())
        assert ESCAPE not in drawn(draft)


def test_pinned_tokens_are_bold_and_not_coloured_by_entropy() -> None:
    tokenizer = library_model().tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode("sky")
    canvas = dg.Canvas(tokens=tokens, pinned=[True] * len(tokens))
    picture = drawn(drafts(canvas=canvas)[0], force_terminal=True, color_system="truecolor")
    assert re.search(r"\x1b\[1;38;2;255;255;255;[\d;]*msky", picture)


def test_nothing_that_a_model_writes_commands_the_terminal() -> None:
    harmless = "Größe 大 🙂 a\tb\nc"
    assert visible(harmless) == harmless
    every_control = "".join(map(chr, (*range(9), *range(11, 32), *range(127, 160))))
    shown = visible(every_control)
    assert len(shown) == len(every_control)
    assert shown.isprintable()


def test_a_console_that_is_no_terminal_gets_lines() -> None:
    stream = io.StringIO()
    with Watch(Console(file=stream), lambda draft: pytest.fail("drawn"), status_line) as watch:
        for draft in drafts():
            watch.show(draft)
    assert stream.getvalue().splitlines() == [status_line(draft) for draft in drafts()]


def test_grids_have_their_boxes() -> None:
    assert plain_grid("123456" * 6).splitlines()[:5] == [
        "┌───────┬───────┐",
        "│ 1 2 3 │ 4 5 6 │",
        "│ 1 2 3 │ 4 5 6 │",
        "├───────┼───────┤",
        "│ 1 2 3 │ 4 5 6 │",
    ]
    nine = plain_grid("123456789" * 9).splitlines()
    assert len(nine) == 13
    assert {len(line) for line in nine} == {25}


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a pseudo-terminal: the test's, and the one that a program uses."""
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def everything(ours: int) -> str:
    """All that is written to the terminal until its last writer has closed it."""
    pieces = []
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux raises this when the other end is closed
            break
        if not piece:
            break
        pieces.append(piece)
    return b"".join(pieces).decode(errors="replace")


def run_in_terminal(terminal: tuple[int, int], *arguments: str, **environment: str) -> str:
    ours, theirs = terminal
    variables = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **environment}
    with started(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=variables) as process:
        os.close(theirs)
        written = everything(ours)
        assert process.wait() == 0
    return written


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a thing of Unix")
def test_a_terminal_shows_the_canvas_then_the_answer(terminal: tuple[int, int]) -> None:
    flags = ["--max-new-tokens", "8", "--steps", "3", "--confidence-threshold", "0"]
    written = run_in_terminal(terminal, "generate", random_checkpoint(), "the sky", "--watch", *flags)
    for step in (1, 2, 3):
        assert f"canvas 1 step {step}/3" in written
    assert "\x1b[?25h" in written  # the cursor is shown again
    answer = library_model().generate("the sky", 8, dg.SamplerConfig(max_denoising_steps=3, confidence_threshold=0.0))
    after = written[written.rindex("\x1b[?25h") :]
    assert visible(answer.text).replace("\n", "\r\n") in after
    assert "8 tokens in 1 canvas, 3 denoising steps" in after


def test_no_color_leaves_colours_out(terminal: tuple[int, int]) -> None:
    flags = ["--watch", "--max-new-tokens", "8", "--steps", "2"]
    written = run_in_terminal(terminal, "generate", random_checkpoint(), "a", *flags, NO_COLOR="1")
    assert "canvas 1 step 1" in written
    assert "38;2;" not in written


def test_demo_in_a_terminal_keeps_the_last_grid(terminal: tuple[int, int]) -> None:
    folder = random_checkpoint(canvas=37)
    written = run_in_terminal(terminal, "demo", "--model", folder, "--seed", "3", "--pause", "0")
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written[written.rindex("canvas 1 step ") :])
    assert last.count("│") == 3 * 6
    assert "WRONG" in last


def test_the_picture_of_the_readme_is_one_of_these() -> None:
    svg = (Path(__file__).resolve().parent.parent / "docs" / "canvas.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg")
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "").replace("https://www.textualize.io", "")
    assert sum(colour in svg for colour in palette.COLOURS) >= 4
    assert "underline" in svg
