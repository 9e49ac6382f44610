"""`dgemma demo`: its runs, its check of the answer, and its drawing."""

from __future__ import annotations

import importlib.util
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from command import ESCAPE, dgemma, random_checkpoint
from dgemma_ext import DiffusionGemma, demo
from dgemma_ext.sampling import Canvas

# A random model over the tokens and the canvas of a 6x6 grid; it solves nothing.
UNTRAINED = {"canvas": 37}


def is_solution(answer: str, puzzle: str) -> bool:
    """The rules written again for 6x6, so that the demo's check is not compared with itself."""
    if not re.fullmatch("[1-6]{36}", answer):
        return False
    rows = [answer[6 * r : 6 * r + 6] for r in range(6)]
    columns = ["".join(column) for column in zip(*rows, strict=True)]
    boxes = ["".join(row[c : c + 3] for row in rows[r : r + 2]) for r in (0, 2, 4) for c in (0, 3)]
    keeps_clues = all(clue in (".", digit) for clue, digit in zip(puzzle, answer, strict=True))
    return keeps_clues and all(len(set(unit)) == 6 for unit in chain(rows, columns, boxes))


def pin_answer(monkeypatch: pytest.MonkeyPatch, change: dict[int, str] | None = None) -> None:
    """Makes any model answer with the solution, with some cells changed."""

    def pinned(puzzle: demo.Puzzle, model: DiffusionGemma) -> Canvas:
        assert model.tokenizer is not None
        digits = [(change or {}).get(cell, digit) for cell, digit in enumerate(puzzle.solution)]
        tokens = [model.tokenizer.id_of(token) for token in (*digits, "<turn|>")]
        return Canvas(tokens=tokens, pinned=[True] * len(tokens))

    monkeypatch.setattr(demo, "pinned_clues", pinned)


def untrained(*flags: str) -> list[str]:
    return ["demo", "--model", random_checkpoint(**UNTRAINED), "--seed", "3", *flags]


def test_the_bundled_model_solves_what_it_has_not_seen() -> None:
    run = dgemma("demo", "--size", "6", "--seed", "1", "--count", "8", "--json")
    assert run.code == 0
    for index, result in enumerate(run.objects):
        puzzle = demo.draw(6, 1, index)
        assert result["puzzle"] == puzzle.text
        assert result["solved"] == is_solution(result["text"], puzzle.text) == (result["text"] == puzzle.solution)
    # The model solves nearly all such puzzles (python/dgemma_ext/demo); eight wrong answers would be no accident.
    assert sum(result["solved"] for result in run.objects) >= 4


def test_every_bundled_model_is_listed_and_found() -> None:
    sizes = demo.checkpoints()
    assert 6 in sizes
    assert demo.checkpoint() == sizes[max(sizes)]
    assert dgemma("info", "--json").object["machine"]["bundled_sudoku_sizes"] == sorted(sizes)
    with pytest.raises(ValueError, match=r"size must be one of 6, 9, got 7"):
        demo.checkpoint(7)


def test_a_right_answer_is_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    pin_answer(monkeypatch)
    run = dgemma(*untrained())
    assert run.code == 0
    assert "solved: every row, column and box is right" in run.out
    assert "WRONG" not in run.out
    assert dgemma(*untrained("--json")).object["solved"] is True


@pytest.mark.parametrize("cell", [0, 35])
def test_a_planted_wrong_digit_is_called_wrong(monkeypatch: pytest.MonkeyPatch, cell: int) -> None:
    right = demo.draw(6, 3).solution[cell]
    pin_answer(monkeypatch, {cell: str(int(right) % 6 + 1)})
    run = dgemma(*untrained())
    assert run.code == 0
    assert "WRONG: 1 cell differs from the solution" in run.out
    assert "solved:" not in run.out
    assert dgemma(*untrained("--json")).object["solved"] is False


def test_an_answer_that_is_no_grid_is_called_wrong() -> None:
    run = dgemma(*untrained("--no-pin", "--count", "2"))
    assert run.code == 0
    assert run.out.count("WRONG: the answer is not a grid of 6x6") == 2
    assert "solved 0 of 2" in run.out


def test_without_a_terminal_it_prints_plain_lines() -> None:
    run = dgemma(*untrained())
    assert (run.code, run.err) == (0, "")
    assert ESCAPE not in run.out
    result = dgemma(*untrained("--json")).object
    steps = [line for line in run.out.splitlines() if line.startswith("canvas 1 step ")]
    assert len(steps) == result["denoising_steps"][0]
    puzzle = demo.draw(6, 3)
    for line in steps:
        shown = line.rpartition(" | ")[2]
        assert len(shown) == 36
        # The clues are pinned, so every draft has them.
        assert all(clue in (".", digit) for clue, digit in zip(puzzle.text, shown, strict=True))
    assert f"6x6 Sudoku, {puzzle.clues} clues" in run.out
    assert f"({len(result['token_ids'])} tokens, {puzzle.clues} of them pinned clues)" in run.out
    assert run.out.endswith("again: dgemma demo --size 6 --seed 3 --count 1\n")


def test_clues_can_be_left_to_the_prompt_alone() -> None:
    free = dgemma(*untrained("--no-pin", "--json", "--watch")).objects
    pinned = dgemma(*untrained("--json", "--watch")).objects
    clues = [cell for cell, digit in enumerate(demo.draw(6, 3).text) if digit != "."]

    def at_clues(events: list[dict[str, list[int]]]) -> list[int]:
        return [events[0]["token_ids"][cell] for cell in clues]

    assert free[-1]["pinned"] is False
    assert pinned[-1]["pinned"] is True
    assert at_clues(free) != at_clues(pinned)


def test_the_seed_draws_the_puzzle_and_another_comes_without_one() -> None:
    drawn = [dgemma(*untrained("--json")).object["puzzle"] for _ in range(2)]
    assert drawn[0] == drawn[1] == demo.draw(6, 3).text
    unseeded = ["demo", "--model", random_checkpoint(**UNTRAINED), "--json"]
    first, second = (dgemma(*unseeded).object for _ in range(2))
    assert first["seed"] != second["seed"]
    assert first["puzzle"] != second["puzzle"]


def test_the_size_must_be_the_model_s() -> None:
    run = dgemma(*untrained("--size", "9"))
    assert run.code == 2
    assert "not that of a 9x9 Sudoku" in run.err


@pytest.fixture
def training_puzzles() -> Any:
    """The example's module of puzzles."""
    file = Path(__file__).resolve().parent.parent / "examples" / "sudoku" / "puzzles.py"
    spec = importlib.util.spec_from_file_location("training_puzzles", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [6, 9])
def test_puzzles_have_one_solution_and_training_draws_others(size: int, training_puzzles: Any) -> None:
    fewest, most = demo.BLANKS[size]
    for index in range(5):
        puzzle = demo.draw(size, 0, index)
        found = training_puzzles.solutions(training_puzzles.from_text(puzzle.text), limit=3)
        assert [training_puzzles.to_text(cells) for cells in found] == [puzzle.solution]
        assert fewest <= puzzle.text.count(".") <= most
        assert demo.check(puzzle.solution, puzzle.text)
    assert not {puzzle.text for puzzle in training_puzzles.held_out(size, (fewest, most), 5, seed=0)} & {
        demo.draw(size, 0, index).text for index in range(5)
    }
