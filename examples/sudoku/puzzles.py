"""Puzzles for training and evaluation. Their generator is in the package, because `dgemma demo` uses it too.

python puzzles.py --size 9 --clues 40 --count 5 --seed 1
"""

from __future__ import annotations

import argparse
import random

from dgemma_ext.demo.puzzles import BLANK, BOX_SHAPES, Puzzle, check, generate, solutions, to_text, units

__all__ = [
    "BLANK",
    "BOX_SHAPES",
    "Puzzle",
    "check",
    "from_text",
    "generate",
    "held_out",
    "solutions",
    "to_text",
    "units",
]


def from_text(text: str) -> list[int]:
    if len(text) not in (36, 81) or not set(text) <= set("123456789" + BLANK):
        raise ValueError(f"a puzzle is 36 or 81 digits and {BLANK!r}, got {text!r}")
    return [0 if character == BLANK else int(character) for character in text]


def held_out(size: int, blanks: tuple[int, int], count: int, seed: int = 10_000) -> list[Puzzle]:
    """The evaluation set: `count` puzzles with a number of blanks uniform in `blanks` (both ends included).

    Training draws from other seeds (examples/sudoku/train.py uses seeds below 10,000).
    """
    rng = random.Random(f"held out {size} {seed}")
    return [generate(size, size * size - rng.randint(*blanks), rng) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints Sudoku puzzles and their solutions.")
    parser.add_argument("--size", type=int, choices=sorted(BOX_SHAPES), default=9)
    parser.add_argument("--clues", type=int, default=40)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    try:
        for _ in range(arguments.count):
            puzzle = generate(arguments.size, arguments.clues, rng)
            print(puzzle.text, puzzle.solution, flush=True)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
