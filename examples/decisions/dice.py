"""Rolls of a die that is fair or loaded, and the probability that it is loaded, which is known exactly.

python dice.py --count 4 --seed 1
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass

FACES = "123456"
# Of the faces, in twentieths.
FAIR = (20 / 6,) * 6
LOADED = (2, 2, 3, 3, 4, 6)
FEWEST, MOST = 4, 36  # rolls
QUESTION = "loaded? "
# The model's words for the answers: one token each.
LABELS = {"yes": "y", "no": "n"}


@dataclass(frozen=True)
class Rolls:
    faces: str
    is_loaded: bool

    @property
    def prompt(self) -> str:
        return QUESTION + self.faces

    @property
    def probability(self) -> float:
        """That the die is loaded, by Bayes' rule; before the first roll it is 1/2."""
        evidence = sum(math.log(LOADED[int(face) - 1] / FAIR[int(face) - 1]) for face in self.faces)
        return 1 / (1 + math.exp(-evidence))


def rolled(rng: random.Random, count: int) -> Rolls:
    """A die that is as often loaded as fair, rolled so many times."""
    is_loaded = rng.random() < 0.5
    return Rolls("".join(rng.choices(FACES, LOADED if is_loaded else FAIR, k=count)), is_loaded)


def held_out(count: int, seed: int = 0) -> list[Rolls]:
    """Rolls that training does not draw."""
    rng = random.Random(f"held out {seed}")
    return [rolled(rng, rng.randint(FEWEST, MOST)) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints rolls, whether the die is loaded, and the exact probability.")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for rolls in held_out(arguments.count, arguments.seed):
        print(rolls.faces, "yes" if rolls.is_loaded else "no", f"{rolls.probability:.3f}")


if __name__ == "__main__":
    main()
