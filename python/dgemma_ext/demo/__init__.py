"""Small Sudoku models that ship with the package, and unseen puzzles to try them on.

A model's canvas holds the digits of the grid and the end of the turn, so the canvas length gives the grid size.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from dgemma_ext import arguments
from dgemma_ext.checkpoint import BUNDLED
from dgemma_ext.demo.puzzles import BLANK, BOX_SHAPES, Puzzle, check, checked_size, generate
from dgemma_ext.sampling import Canvas

if TYPE_CHECKING:
    from dgemma_ext.diffusion_gemma import DiffusionGemma

__all__ = ["Puzzle", "check", "checkpoint", "checkpoints", "draw", "grid_size", "pinned_clues"]

# The least and most blanks of a puzzle: the range that examples/sudoku/train.py evaluates the checkpoints on.
BLANKS = {6: (10, 22), 9: (35, 45)}


def checkpoints() -> dict[int, Path]:
    """Grid size → folder of the checkpoint, for every checkpoint that ships."""
    return {int(name.partition("x")[0]): folder for name, folder in BUNDLED.items()}


def checkpoint(size: int | None = None) -> Path:
    """The folder of the bundled checkpoint for grids of `size`, default the largest. Raises ValueError for others."""
    found = checkpoints()
    return found[max(found) if size is None else checked_size(size)]


def grid_size(canvas_length: int) -> int | None:
    """The size of the grids whose digits and end of turn fill a canvas; None where there is no such grid."""
    return next((size for size in BOX_SHAPES if size * size + 1 == canvas_length), None)


def draw(size: int, seed: int, index: int = 0) -> Puzzle:
    """Puzzle number `index` of a seed, with one solution, from random streams that training never uses.

    The number of clues is random in the range that the checkpoints are evaluated on. Raises ValueError for a size other
    than 6 and 9, and for a seed or an index below 0.
    """
    size, seed = checked_size(size), arguments.integer("seed", seed, end=2**63)
    rng = random.Random(f"demo {size} {seed} {arguments.integer('index', index)}")
    return generate(size, size * size - rng.randint(*BLANKS[size]), rng)


def pinned_clues(puzzle: Puzzle, model: DiffusionGemma) -> Canvas:
    """A canvas that holds the puzzle's clues in place and leaves its blanks to the model."""
    arguments.instance("puzzle", puzzle, Puzzle, "a puzzle of demo.draw")
    if model.tokenizer is None:
        raise ValueError("model has no tokenizer, which spells the digits")
    tokens = [None if digit == BLANK else model.tokenizer.id_of(digit) for digit in puzzle.text]
    return Canvas(tokens=tokens, pinned=[token is not None for token in tokens])
