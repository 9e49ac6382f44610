"""Writes the examples of a task that no bundled model has seen: Sudoku, answered with 7 - d in place of each digit d.

python make_data.py --out data            # data/train.jsonl, data/eval.jsonl, data/test.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from dgemma_ext.demo.puzzles import Puzzle, generate

SIZE, BLANKS = 6, (10, 22)
# Examples of each file. Evaluation takes the first 64 of eval.jsonl; test.jsonl is for the end alone.
COUNTS = {"train": 16_000, "eval": 64, "test": 1_000}
CODE = str.maketrans("123456", "654321")


def puzzles(name: str, count: int) -> Iterator[Puzzle]:
    """Puzzles with one solution, from a random stream of each file's own."""
    rng = random.Random(f"fine-tuning {name}")
    for _ in range(count):
        yield generate(SIZE, SIZE * SIZE - rng.randint(*BLANKS), rng)


def response(puzzle: Puzzle) -> str:
    return puzzle.solution.translate(CODE)


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The three streams are independent, and there are millions of puzzles; a repeated one would still be a seen one.
    seen: set[str] = set()
    for name in ("test", "eval", "train"):
        with (folder / f"{name}.jsonl").open("w") as out:
            for puzzle in puzzles(name, COUNTS[name]):
                if puzzle.text not in seen:
                    print(json.dumps({"prompt": puzzle.text, "response": response(puzzle)}), file=out)
                if name != "train":
                    seen.add(puzzle.text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
