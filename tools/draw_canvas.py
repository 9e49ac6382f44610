"""Draws docs/canvas.svg: a bundled model filling in a Sudoku it has not seen, one picture per denoising step.

    python tools/draw_canvas.py --size 6 --seed 11

Nothing is staged: the drafts are those of `dgemma demo` with the same size and seed.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.columns import Columns
from rich.console import Console, Group
from rich.padding import Padding
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from dgemma_ext import DiffusionGemma, Draft, demo
from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.cli.grid import draft_grid
from dgemma_ext.cli.palette import BACKGROUND, CAPTION

# Rich's own SVG loads its font from a server; this one needs none.
SVG_FORMAT = re.sub(r"@font-face {{.*?}}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)

MOST_PICTURES = 8
PICTURES_PER_ROW = 4


def rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def picture(draft: Draft, puzzle: demo.Puzzle, tokenizer: Tokenizer) -> Padding:
    caption = Text(f"step {draft.step}: {draft.mean_entropy:.3f} nats", style=CAPTION)
    return Padding(Group(caption, draft_grid(draft, puzzle.text, tokenizer)), (0, 2, 1, 1))


def evenly(drafts: list[Draft]) -> list[Draft]:
    """At most MOST_PICTURES of them, with the first and the last."""
    count = min(len(drafts), MOST_PICTURES)
    return [drafts[round(i * (len(drafts) - 1) / max(count - 1, 1))] for i in range(count)]


def draw(size: int, seed: int) -> str:
    model = DiffusionGemma.from_pretrained(demo.checkpoint(size))
    assert model.tokenizer is not None
    puzzle = demo.draw(size, seed)
    drafts: list[Draft] = []
    output = model.generate(puzzle.text, seed=seed, canvas=demo.pinned_clues(puzzle, model), on_draft=drafts.append)
    if not demo.check(output.text, puzzle.text):
        raise SystemExit(f"seed {seed} is not solved; the picture's caption says that it is: try another")
    pictures = [picture(draft, puzzle, model.tokenizer) for draft in evenly(drafts)]
    width = min(len(pictures), PICTURES_PER_ROW) * (2 * size + 2 * (size // 3) + 5)
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Columns(pictures, padding=0))
    grey = [(90, 96, 110)] * 8
    return console.export_svg(
        title=f"dgemma demo --size {size} --seed {seed}",
        theme=TerminalTheme(rgb(BACKGROUND), rgb(CAPTION), grey, grey),
        code_format=SVG_FORMAT,
        unique_id="canvas",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws docs/canvas.svg from a run of a bundled model.")
    parser.add_argument("--size", type=int, default=6)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "canvas.svg")
    arguments = parser.parse_args()
    svg = draw(arguments.size, arguments.seed)
    arguments.out.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
