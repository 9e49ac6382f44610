"""`dgemma demo`: a bundled model solves Sudoku puzzles that it has not seen, and the answers are checked."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

from rich.console import Console

from dgemma_ext import demo
from dgemma_ext.checkpoint import Tokenizer, resolve_checkpoint
from dgemma_ext.cli.answer import Timed, event_fields, load_checkpoint, result_fields, tokenizer_of, write_json
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.cli.grid import draft_digits, draft_picture, plain_grid
from dgemma_ext.cli.watch import Watch, status_line, visible
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine import Draft, Output


@dataclass(frozen=True)
class Attempt:
    """A puzzle, the model's answer, and the seconds that it took."""

    puzzle: demo.Puzzle
    pinned: bool
    output: Output
    seconds: float

    @property
    def is_solved(self) -> bool:
        return demo.check(self.output.text, self.puzzle.text)

    @property
    def wrong_cells(self) -> int | None:
        """The number of cells that differ from the solution; None where the answer is not a grid of its size."""
        answer = self.output.text.strip()
        if len(answer) != len(self.puzzle.solution):
            return None
        return sum(given != wanted for given, wanted in zip(answer, self.puzzle.solution, strict=True))


def run(arguments: Arguments) -> None:
    folder = demo.checkpoint(arguments.size) if arguments.model is None else resolve_checkpoint(arguments.model)
    model = load_checkpoint(folder, arguments)
    size = demo.grid_size(model.config.canvas_length)
    if size is None or arguments.size not in (None, size):
        wanted = "a Sudoku" if size is None else f"a {arguments.size}x{arguments.size} Sudoku"
        raise ValueError(f"{folder} has a canvas of {model.config.canvas_length} tokens, which is not that of {wanted}")
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    attempts = []
    for index in range(arguments.count):
        attempts.append(_attempt(model, demo.draw(size, seed, index), seed, arguments))
        if arguments.json:
            write_json(_attempt_fields(attempts[-1], seed, index))
    if not arguments.json:
        print(_tally(attempts) + f"again: dgemma demo --size {size} --seed {seed} --count {len(attempts)}")


def _attempt(model: DiffusionGemma, puzzle: demo.Puzzle, seed: int, arguments: Arguments) -> Attempt:
    """Solves one puzzle, and shows it unless the output is JSON."""
    tokenizer = tokenizer_of(model)
    canvas = demo.pinned_clues(puzzle, model) if arguments.pin else None
    events = Timed(model.stream(puzzle.text, model.config.canvas_length, seed=seed, canvas=canvas))
    console = Console(highlight=False)
    if not arguments.json:
        print(f"{puzzle.size}x{puzzle.size} Sudoku, {puzzle.clues} clues, one solution", flush=True)
        if not console.is_terminal:
            print(plain_grid(puzzle.text), flush=True)

    picture = partial(draft_picture, puzzle=puzzle.text, tokenizer=tokenizer)
    line = partial(_draft_line, puzzle=puzzle.text, tokenizer=tokenizer)
    with Watch(console, picture, line, keep=True, pause=arguments.pause) as watch:
        for event in events:
            if not arguments.json and isinstance(event, Draft):
                watch.show(event)
            elif arguments.json and arguments.watch:
                write_json(event_fields(event))
    attempt = Attempt(puzzle, arguments.pin, event.request.output, events.seconds)
    if not arguments.json:
        if not console.is_terminal:
            answer = visible(attempt.output.text.strip())
            print(f"the answer is {answer!r}" if attempt.wrong_cells is None else plain_grid(answer))
        print(_verdict(attempt), flush=True)
    return attempt


def _draft_line(draft: Draft, puzzle: str, tokenizer: Tokenizer) -> str:
    return f"{status_line(draft)} | {draft_digits(draft, puzzle, tokenizer)}"


def _verdict(attempt: Attempt) -> str:
    """Whether the answer is right, its denoising steps, and the seconds without those of drawing."""
    output, wrong = attempt.output, attempt.wrong_cells
    if attempt.is_solved:
        verdict = "solved: every row, column and box is right"
    elif wrong is None:
        verdict = f"WRONG: the answer is not a grid of {attempt.puzzle.size}x{attempt.puzzle.size}"
    else:
        verdict = f"WRONG: {wrong} {'cell differs' if wrong == 1 else 'cells differ'} from the solution"
    pinned = f", {attempt.puzzle.clues} of them pinned clues" if attempt.pinned else ""
    return (
        f"{verdict}\n{sum(output.denoising_steps)} denoising steps, {output.tokens_per_forward:.1f} tokens per forward "
        f"({len(output.token_ids)} tokens{pinned}), {attempt.seconds:.2f} s"
    )


def _tally(attempts: list[Attempt]) -> str:
    if len(attempts) == 1:
        return ""
    steps = mean(sum(attempt.output.denoising_steps) for attempt in attempts)
    return (
        f"solved {sum(attempt.is_solved for attempt in attempts)} of {len(attempts)}; on average {steps:.1f} denoising "
        f"steps and {mean(attempt.seconds for attempt in attempts):.2f} s\n"
    )


def _attempt_fields(attempt: Attempt, seed: int, index: int) -> dict[str, Any]:
    return result_fields(attempt.output, attempt.seconds) | {
        "seed": seed,
        "index": index,
        "size": attempt.puzzle.size,
        "puzzle": attempt.puzzle.text,
        "clues": attempt.puzzle.clues,
        "pinned": attempt.pinned,
        "solved": attempt.is_solved,
    }
