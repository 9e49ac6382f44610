"""Sudoku grids as pictures."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.cli.palette import token_style
from dgemma_ext.cli.watch import framed, pinned_positions, token_piece
from dgemma_ext.demo.puzzles import BLANK, BOX_SHAPES
from dgemma_ext.engine import Draft

# Shown in a cell whose token is not a single character, such as noise.
_NO_DIGIT = "·"


def grid_text(cells: Sequence[tuple[str, str]]) -> Text:
    """A grid with lines between its boxes, from one character and one rich style per cell, row by row."""
    size = round(len(cells) ** 0.5)
    box_rows, box_columns = BOX_SHAPES[size]
    boxes_across = size // box_columns
    bar = "─" * (2 * box_columns + 1)

    text = Text("┌" + "┬".join([bar] * boxes_across) + "┐\n")
    for row in range(size):
        if row and row % box_rows == 0:
            text.append("├" + "┼".join([bar] * boxes_across) + "┤\n")
        for column in range(size):
            text.append("│ " if column % box_columns == 0 else "")
            text.append(*cells[row * size + column]).append(" ")
        text.append("│\n")
    return text.append("└" + "┴".join([bar] * boxes_across) + "┘")


def plain_grid(digits: str) -> str:
    return grid_text([(digit, "") for digit in digits]).plain


def draft_picture(draft: Draft, puzzle: str, tokenizer: Tokenizer) -> RenderableType:
    """A draft as a grid, each cell in its entropy's colour, with the figures of its step."""
    return framed(draft, draft_grid(draft, puzzle, tokenizer))


def draft_grid(draft: Draft, puzzle: str, tokenizer: Tokenizer) -> Text:
    """The cells of a draft, with pinned clues in the pinned style."""
    pinned = pinned_positions(draft)
    entropies, accepted = draft.entropy.tolist(), draft.accepted.tolist()
    return grid_text(
        [
            (character, token_style(entropies[cell], accepted[cell], cell in pinned))
            for cell, character in enumerate(draft_digits(draft, puzzle, tokenizer))
        ]
    )


def draft_digits(draft: Draft, puzzle: str, tokenizer: Tokenizer) -> str:
    """One character for every cell of the puzzle."""
    pieces = [token_piece(token, tokenizer) for token in draft.token_ids[: len(puzzle)]]
    return "".join(piece if len(piece) == 1 and piece not in ("\n", "\t", BLANK) else _NO_DIGIT for piece in pieces)
