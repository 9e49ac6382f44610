"""Prints a bundled model's answers to unseen puzzles as JSON, for tests that run it in another process.

python tests/solve_puzzles.py 6 8 [device [weights]]

"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

import dgemma_ext as dg
from dgemma_ext import demo

SEED = 20261121


def answers(size: int, count: int, device: str = "cpu", weights: str = "auto") -> list[dict[str, Any]]:
    """Text, steps and whether the puzzle is solved, with the clues pinned for every second one."""
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(size), device=device, weights=weights)
    own_memory(model.weights)
    for layer in model.weights.layers:
        own_memory(layer)
    found = []
    for index in range(count):
        puzzle = demo.draw(size, SEED, index)
        canvas = demo.pinned_clues(puzzle, model) if index % 2 else None
        out = model.generate(
            [{"role": "user", "content": puzzle.text}],
            max_new_tokens=model.config.canvas_length,
            seed=index,
            canvas=canvas,
        )
        solved = demo.check(out.text, puzzle.text)
        found.append({"text": out.text, "steps": list(out.denoising_steps), "solved": solved})
    return found


def own_memory(record: Any) -> None:
    """Copies every tensor to an aligned allocation, as on a GPU; a mapped file may have it at any address."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, torch.Tensor):
            object.__setattr__(record, field.name, value.clone())


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps(answers(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])))
