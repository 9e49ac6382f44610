"""Sudoku puzzles with one solution, 6x6 (boxes of 2 rows by 3 columns) and 9x9, reproducible by seed.

A puzzle is one line of 36 or 81 characters, row by row, "." where a cell is blank; its solution is the same line with
every digit filled in.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from dgemma_ext import arguments

BLANK = "."
BOX_SHAPES = {6: (2, 3), 9: (3, 3)}  # grid size -> rows and columns of a box
# The fewest clues that leave one solution: 17 by an exhaustive search (McGuire, Tugemann and Civario, "There is no
# 16-clue Sudoku", 2012), 8 for a 6x6 grid.
FEWEST_CLUES = {6: 8, 9: 17}
# `generate` gives up after so many grids: with the clues of the bundled models' puzzles the first few do.
_ATTEMPTS = 100


@dataclass(frozen=True)
class Puzzle:
    """A puzzle and its only solution, both as lines of text."""

    text: str
    solution: str

    @property
    def size(self) -> int:
        return round(len(self.text) ** 0.5)

    @property
    def clues(self) -> int:
        return len(self.text) - self.text.count(BLANK)


def units(size: int) -> list[list[int]]:
    """The cells of every row, column and box, as indices into the line."""
    box_rows, box_columns = BOX_SHAPES[size]
    rows = [[r * size + c for c in range(size)] for r in range(size)]
    columns = [[r * size + c for r in range(size)] for c in range(size)]
    boxes = [
        [(top + r) * size + left + c for r in range(box_rows) for c in range(box_columns)]
        for top in range(0, size, box_rows)
        for left in range(0, size, box_columns)
    ]
    return rows + columns + boxes


_UNITS = {size: units(size) for size in BOX_SHAPES}
_CELL_UNITS = {
    size: [[u for u, unit in enumerate(_UNITS[size]) if cell in unit] for cell in range(size * size)]
    for size in BOX_SHAPES
}


def solutions(cells: list[int], limit: int = 2, rng: random.Random | None = None) -> list[list[int]]:
    """Up to `limit` completions of a grid (0 is a blank), by depth-first search on the cell with fewest candidates.

    With `rng` the candidates are tried in random order, so that an empty grid gives a random filled one.
    """
    size = round(len(cells) ** 0.5)
    cell_units = _CELL_UNITS[size]
    free = [(1 << size) - 1] * (3 * size)  # per unit, one bit per digit not yet placed
    grid = list(cells)
    for cell, digit in enumerate(grid):
        if digit:
            bit = 1 << (digit - 1)
            for unit in cell_units[cell]:
                if not free[unit] & bit:
                    return []
                free[unit] &= ~bit
    blanks = [cell for cell, digit in enumerate(grid) if not digit]
    found: list[list[int]] = []

    def search() -> None:
        best_at, best, fewest = -1, 0, size + 1
        for at, cell in enumerate(blanks):
            a, b, c = cell_units[cell]
            candidates = free[a] & free[b] & free[c]
            count = candidates.bit_count()
            if count < fewest:
                best_at, best, fewest = at, candidates, count
                if count <= 1:
                    break
        if best_at < 0:
            found.append(list(grid))
            return
        if not best:
            return
        cell = blanks.pop(best_at)
        digits = [digit for digit in range(1, size + 1) if best >> (digit - 1) & 1]
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            bit = 1 << (digit - 1)
            grid[cell] = digit
            for unit in cell_units[cell]:
                free[unit] ^= bit
            search()
            for unit in cell_units[cell]:
                free[unit] ^= bit
            if len(found) >= limit:
                break
        grid[cell] = 0
        blanks.insert(best_at, cell)

    search()
    return found


def _stays_unique(cells: list[int], cell: int, digit: int, size: int) -> bool:
    """Whether a grid with one solution still has only one after `digit` was removed from `cell`."""

    def may_hold(other: int) -> bool:
        return all(cells[seen] != digit for unit in _CELL_UNITS[size][other] for seen in _UNITS[size][unit])

    # Where a row, column or box has no other cell for the digit, the digit is forced and no search is needed.
    for unit in _CELL_UNITS[size][cell]:
        if not any(cells[other] == 0 and other != cell and may_hold(other) for other in _UNITS[size][unit]):
            return True
    return len(solutions(cells, limit=2)) == 1


def checked_size(size: Any) -> int:
    """The size of a grid as an argument; raises ValueError for one that has no puzzles."""
    found = arguments.integer("size", size)
    if found not in BOX_SHAPES:
        raise arguments.refusal("size", f"one of {', '.join(map(str, BOX_SHAPES))}", found)
    return found


def generate(size: int, clues: int, rng: random.Random) -> Puzzle:
    """A random puzzle with `clues` clues and one solution: blanks cells in random order, starts over when stuck.

    Raises ValueError for a number of clues that no puzzle has, or that blanking cells in random order does not reach.
    """
    size = checked_size(size)
    clues = arguments.integer("clues", clues, least=FEWEST_CLUES[size], end=size * size + 1)
    arguments.instance("rng", rng, random.Random, "a random.Random")
    for _ in range(_ATTEMPTS):
        solution = solutions([0] * (size * size), limit=1, rng=rng)[0]
        cells = list(solution)
        left = size * size
        for cell in rng.sample(range(size * size), size * size):
            if left == clues:
                break
            digit, cells[cell] = cells[cell], 0
            if _stays_unique(cells, cell, digit, size):
                left -= 1
            else:
                cells[cell] = digit
        if left == clues:
            return Puzzle(to_text(cells), to_text(solution))
    raise ValueError(f"clues is {clues}, and none of {_ATTEMPTS} random grids has a puzzle with so few; try more clues")


def to_text(cells: list[int]) -> str:
    return "".join(str(digit) if digit else BLANK for digit in cells)


def check(answer: str, puzzle: str) -> bool:
    """Whether `answer`, the model's text, is a solution of `puzzle`. White space around it is ignored."""
    size = round(len(arguments.text("puzzle", puzzle)) ** 0.5)
    if size not in BOX_SHAPES or len(puzzle) != size * size:
        raise arguments.refusal("puzzle", "a line of 36 or 81 characters", puzzle)
    answer = arguments.instance("answer", answer, str, "a string").strip()
    if len(answer) != len(puzzle) or not answer.isascii() or not answer.isdigit():
        return False
    if any(clue not in (BLANK, given) for clue, given in zip(puzzle, answer, strict=True)):
        return False
    digits = {str(digit) for digit in range(1, size + 1)}
    return all({answer[cell] for cell in unit} == digits for unit in _UNITS[size])
