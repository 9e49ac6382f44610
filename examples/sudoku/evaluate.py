"""The share of held-out puzzles that a checkpoint solves: clues pinned, nothing pinned, digits alone allowed, and
answers held to a grammar.

python evaluate.py ../../python/dgemma_ext/demo --count 1000
python evaluate.py runs/9x9 --count 1000 --engine transformers
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import puzzles

Outcome = tuple[list[str], list[int]]  # answers and denoising steps, one per puzzle
Solve = Callable[[list[str], str, int], Outcome]  # puzzles, what rules their answers, seed

# What rules an answer: its clues are pinned, nothing, it may hold the digits alone, or it matches an expression: of
# digits, or of rows that have the puzzle's clues and every digit once.
RULES = ("clues", "nothing", "digits", "digit-grammar", "row-grammar")
# An expression may have 64 KiB. A row with more blanks than these has any missing digit at each of them, twice or not:
# 8 blanks alone would be 109,601 branches. The first that fits is taken.
MOST_ORDERED = (7, 6)
LONGEST_EXPRESSION = 65_536


def with_transformers(folder: Path, batch: int, weights: str, activations: str | None) -> Solve:
    """The oracle: transformers' model class under the loop in sampling.py."""
    import torch

    import checkpoint
    import sampling
    import tokenizer

    if weights != "auto" or activations is not None:
        raise ValueError("--weights and --activations are for the engine dgemma_ext")
    model = checkpoint.load(folder)
    text = tokenizer.build()

    def solve(lines: list[str], rule: str, seed: int) -> Outcome:
        if rule not in ("clues", "nothing"):
            raise ValueError("transformers has no allowed tokens and no grammars")
        torch.manual_seed(seed)
        answers: list[str] = []
        steps: list[int] = []
        for start in range(0, len(lines), batch):
            part = lines[start : start + batch]
            prompts = torch.tensor([sampling.prompt_ids(text, line) for line in part])
            clues = torch.tensor([sampling.clue_canvas(text, line) for line in part]) if rule == "clues" else None
            drafts, taken = sampling.generate(model, prompts, clues)
            steps += taken.tolist()
            answers += [sampling.answer_text(text, draft) for draft in drafts.tolist()]
        return answers, steps

    return solve


def with_dgemma(folder: Path, batch: int, weights: str, activations: str | None) -> Solve:
    import dgemma_ext as dg
    from dgemma_ext.demo import Puzzle, pinned_clues

    model = dg.DiffusionGemma.from_pretrained(str(folder), weights=weights, activations=activations)
    vocabulary = model.tokenizer

    def canvas_of(line: str, rule: str) -> dg.Canvas | None:
        if rule == "clues":
            return pinned_clues(Puzzle(line, ""), model)
        if rule != "digits":
            return None
        digits = [vocabulary.id_of(str(digit)) for digit in range(1, round(len(line) ** 0.5) + 1)]
        return dg.Canvas(allowed=[*[digits] * len(line), [vocabulary.id_of("<turn|>")]])

    def grammar_of(line: str, rule: str) -> dg.Regex | None:
        if rule == "digit-grammar":
            size = round(len(line) ** 0.5)
            return dg.Regex(f"[1-{size}]{{{len(line)}}}")
        return dg.Regex(rows_expression(line)) if rule == "row-grammar" else None

    def solve(lines: list[str], rule: str, seed: int) -> Outcome:
        answers: list[str] = []
        steps: list[int] = []
        for start in range(0, len(lines), batch):
            part = lines[start : start + batch]
            outputs = model.generate(
                part,
                max_new_tokens=len(lines[0]) + 1,
                seed=[seed + start + row for row in range(len(part))],
                canvas=[canvas_of(line, rule) for line in part],
                grammar=[grammar_of(line, rule) for line in part],
            )
            answers += [output.text for output in outputs]
            steps += [sum(output.denoising_steps) for output in outputs]
        return answers, steps

    return solve


def rows_expression(line: str) -> str:
    """An expression of the grids with the clues of a puzzle whose rows have every digit once."""
    size = round(len(line) ** 0.5)
    rows = [line[start : start + size] for start in range(0, len(line), size)]
    missing = ["".join(digit for digit in map(str, range(1, size + 1)) if digit not in row) for row in rows]
    for most in MOST_ORDERED:
        expression = "".join(
            _row_expression(row, digits) if len(digits) <= most else row.replace(puzzles.BLANK, f"[{digits}]")
            for row, digits in zip(rows, missing, strict=True)
        )
        if len(expression) <= LONGEST_EXPRESSION:
            break
    return expression


def _row_expression(row: str, missing: str) -> str:
    """The rest of a row whose blanks take the missing digits, in any order."""
    if not missing:
        return row
    before, _, after = row.partition(puzzles.BLANK)
    branches = [digit + _row_expression(after, missing.replace(digit, "")) for digit in missing]
    return before + (branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})")


ENGINES = {"dgemma_ext": with_dgemma, "transformers": with_transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--blanks", type=int, nargs=2, help="fewest and most blanks; default 10 22 (6x6), 35 45 (9x9)")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--weights", default="auto", help="fp8, int4, int4-64, int4-128 or nvfp4: quantize on loading")
    parser.add_argument("--activations", choices=["fp8"], help="round what goes into experts with fp8 weights too")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the puzzles are always the same")
    parser.add_argument("--engine", choices=ENGINES, default="dgemma_ext")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES[:2]), help="what rules the answers")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    cells = json.loads((arguments.checkpoint / "config.json").read_text())["canvas_length"] - 1
    size = round(cells**0.5)
    blanks = tuple(arguments.blanks or {6: (10, 22), 9: (35, 45)}[size])
    test = puzzles.held_out(size, blanks, arguments.count)
    options = (arguments.batch, arguments.weights, arguments.activations)
    solve = ENGINES[arguments.engine](arguments.checkpoint, *options)
    for rule in arguments.rules:
        began = time.perf_counter()
        answers, steps = solve([puzzle.text for puzzle in test], rule, arguments.seed)
        solved = sum(puzzles.check(answer, puzzle.text) for answer, puzzle in zip(answers, test, strict=True))
        report = {
            "engine": arguments.engine,
            "weights": arguments.weights,
            "activations": arguments.activations,
            "puzzles": len(test),
            "size": size,
            "blanks": list(blanks),
            "rule": rule,
            "solved": solved / len(test),
            "denoising_steps": round(sum(steps) / len(steps), 2),
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
