"""6x6 Sudoku grids of which half have a solution and half have none, reproducible by seed.

python boards.py --count 4 --seed 1
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sudoku"))

import puzzles

SIZE = 6
BLANKS = (10, 22)
# What a prompt says before the grid. The question comes first, so that what the model encodes of a grid is for it.
QUESTION = "solvable? "
# The model's words for the answers: one token each.
LABELS = {"yes": "y", "no": "n"}
_UNITS = puzzles.units(SIZE)


@dataclass(frozen=True)
class Board:
    """A line of 36 characters, "." where a cell is blank, and whether its blanks can be filled."""

    text: str
    has_solution: bool

    @property
    def prompt(self) -> str:
        return QUESTION + self.text

    @property
    def has_conflict(self) -> bool:
        """Whether a row, a column or a box has a digit twice. A grid may have no solution without that."""
        units = [[self.text[cell] for cell in unit if self.text[cell] != puzzles.BLANK] for unit in _UNITS]
        return any(len(set(digits)) < len(digits) for digits in units)


def spoiled(cells: list[int], rng: random.Random, hides: bool) -> list[int]:
    """A grid with one clue changed, so that it has no solution.

    hides: whether no row, column or box shall show it by a digit that it has twice, where there is such a change.
    """
    clues = [cell for cell, digit in enumerate(cells) if digit]
    changes = [(cell, digit) for cell in clues for digit in range(1, SIZE + 1) if digit != cells[cell]]
    rng.shuffle(changes)
    with_conflict = [change for change in changes if _conflicts(cells, *change)]
    for cell, digit in [change for change in changes if change not in with_conflict] if hides else []:
        changed = [*cells[:cell], digit, *cells[cell + 1 :]]
        if not puzzles.solutions(changed, limit=1):
            return changed
    cell, digit = with_conflict[0]
    return [*cells[:cell], digit, *cells[cell + 1 :]]


def _conflicts(cells: list[int], cell: int, digit: int) -> bool:
    """Whether a digit in a cell would stand a second time in a row, a column or a box."""
    return any(cells[other] == digit for unit in _UNITS if cell in unit for other in unit if other != cell)


def held_out(count: int, seed: int = 0) -> list[Board]:
    """Boards that training does not draw: puzzles with 10 to 22 blanks, half of them spoiled, half of those hidden."""
    rng = random.Random(f"boards {seed}")
    boards = []
    for index, puzzle in enumerate(puzzles.held_out(SIZE, BLANKS, count, seed=20_000 + seed)):
        cells = puzzles.from_text(puzzle.text)
        has_solution = index % 2 == 0
        text = puzzle.text if has_solution else puzzles.to_text(spoiled(cells, rng, hides=index % 4 == 1))
        boards.append(Board(text, has_solution))
    return boards


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints grids, and whether they have a solution.")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for board in held_out(arguments.count, arguments.seed):
        print(board.text, "yes" if board.has_solution else "no", flush=True)


if __name__ == "__main__":
    main()
