"""How often decisions about held-out grids are right, how well their probabilities are calibrated, and what they cost.

python evaluate_boards.py runs/boards --count 2000 --plot calibration.png
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import dgemma_ext as dg
from boards import LABELS, Board, held_out
from dgemma_ext import demo

BINS = 10


def probabilities_of_yes(model: dg.DiffusionGemma, boards: Sequence[Board], seed: int = 0) -> list[float]:
    decisions = model.decide([board.prompt for board in boards], LABELS, seed=seed)
    return [decision.probabilities["yes"] for decision in decisions]


def reliability(probabilities: Sequence[float], answers: Sequence[bool]) -> list[dict[str, float]]:
    """Per bin of probabilities: how many there are, their mean, and the share of yes among the answers."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for probability, answer in zip(probabilities, answers, strict=True):
        bins[min(int(probability * BINS), BINS - 1)].append((probability, answer))
    return [
        {"count": len(one), "mean": statistics.mean(p for p, _ in one), "share": statistics.mean(a for _, a in one)}
        for one in bins
        if one
    ]


def scores(probabilities: Sequence[float], answers: Sequence[bool]) -> dict[str, float]:
    """right: share decided right. calibration_error: expected, over ten bins. log_loss: in nats; ln 2 = 0.69 is
    ignorance. brier: mean squared error."""
    pairs = list(zip(probabilities, answers, strict=True))
    rows = reliability(probabilities, answers)
    return {
        "right": statistics.mean((p > 0.5) == a for p, a in pairs),
        "calibration_error": sum(row["count"] * abs(row["mean"] - row["share"]) for row in rows) / len(pairs),
        "log_loss": statistics.mean(-math.log(max(p if a else 1 - p, 1e-12)) for p, a in pairs),
        "brier": statistics.mean((p - a) ** 2 for p, a in pairs),
    }


def solved_share(model: dg.DiffusionGemma, boards: Sequence[Board]) -> float:
    """The share decided right by whether the model that solves grids finds a solution."""
    outputs = model.generate([board.text for board in boards], seed=0)
    found = [demo.check(output.text, board.text) for output, board in zip(outputs, boards, strict=True)]
    return statistics.mean(one == board.has_solution for one, board in zip(found, boards, strict=True))


def milliseconds(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Medians of calls that take turns, so that other work on the machine falls on all alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call(turn)
            taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: round(statistics.median(values[1:]), 2) for name, values in taken.items()}  # the first one warms up


def draw(rows: Sequence[dict[str, float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(4, 4.6), dpi=100, sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    above.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    above.plot([row["mean"] for row in rows], [row["share"] for row in rows], "o-", color="tab:blue", markersize=5)
    above.set_ylabel("share that has a solution")
    above.set_aspect("equal")
    below.bar([row["mean"] for row in rows], [row["count"] for row in rows], width=0.06, color="tab:blue")
    below.set_yscale("log")
    below.set_ylabel("grids")
    below.set_xlabel("probability of yes")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--plot", type=Path, help="where to draw the calibration")
    parser.add_argument("--rounds", type=int, default=31, help="of the timing")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    model = dg.DiffusionGemma.from_pretrained(arguments.checkpoint, device="cpu")
    solver = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")
    boards = held_out(arguments.count)
    answers = [board.has_solution for board in boards]
    probabilities = probabilities_of_yes(model, boards)
    others = probabilities_of_yes(model, boards, seed=1)
    report = {name: round(value, 4) for name, value in scores(probabilities, answers).items()}
    report["other_noise_decides_alike"] = statistics.mean(
        (p > 0.5) == (q > 0.5) for p, q in zip(probabilities, others, strict=True)
    )
    kinds = {
        "solution": [board.has_solution for board in boards],
        "conflict": [board.has_conflict for board in boards],
        "hidden": [not board.has_solution and not board.has_conflict for board in boards],
    }
    for kind, chosen in kinds.items():
        right = [(p > 0.5) == a for p, a, is_one in zip(probabilities, answers, chosen, strict=True) if is_one]
        report[f"right_{kind}"] = round(statistics.mean(right), 4)
    report["right_by_solving"] = round(solved_share(solver, boards[:400]), 4)
    print(json.dumps(report))
    rows = reliability(probabilities, answers)
    for row in rows:
        print(json.dumps({name: round(value, 3) for name, value in row.items()}))
    batch = [board.prompt for board in boards[:32]]
    calls = {
        "decision": lambda turn: model.decide(boards[turn].prompt, LABELS),
        "decisions_of_32": lambda turn: model.decide(batch, LABELS, seed=turn),
        "full_answer": lambda turn: solver.generate(boards[turn].text, seed=turn),
    }
    print(json.dumps({"milliseconds": milliseconds(calls, arguments.rounds)}))
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
