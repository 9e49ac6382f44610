"""The puzzles, which live in the package so that `dgemma demo` has them: see dgemma_ext/demo/puzzles.py.

python puzzles.py --size 9 --clues 40 --count 5 --seed 1
"""

from __future__ import annotations

from dgemma_ext.demo.puzzles import (
    BLANK,
    BOX_SHAPES,
    Puzzle,
    check,
    from_text,
    generate,
    held_out,
    main,
    solutions,
    to_text,
    units,
)

__all__ = [
    "BLANK",
    "BOX_SHAPES",
    "Puzzle",
    "check",
    "from_text",
    "generate",
    "held_out",
    "main",
    "solutions",
    "to_text",
    "units",
]

if __name__ == "__main__":
    main()
