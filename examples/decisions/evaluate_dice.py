"""How well decisions about held-out dice are calibrated, how near they are to the exact probabilities, what they cost.

python evaluate_dice.py runs/dice --count 2000 --plot calibration.png
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
from dice import LABELS, Rolls, held_out

BINS = 10


def probabilities_of_yes(model: dg.DiffusionGemma, rolls: Sequence[Rolls], seed: int = 0) -> list[float]:
    decisions = model.decide([one.prompt for one in rolls], LABELS, seed=seed)
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
    ignorance."""
    pairs = list(zip(probabilities, answers, strict=True))
    rows = reliability(probabilities, answers)
    return {
        "right": statistics.mean((p > 0.5) == a for p, a in pairs),
        "calibration_error": sum(row["count"] * abs(row["mean"] - row["share"]) for row in rows) / len(pairs),
        "log_loss": statistics.mean(-math.log(max(p if a else 1 - p, 1e-12)) for p, a in pairs),
    }


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.mean(abs(p - q) for p, q in zip(one, other, strict=True))


def full_answers(model: dg.DiffusionGemma, rolls: Sequence[Rolls]) -> dict[str, float]:
    """The share of answers that are right, and their denoising steps, where the model writes them."""
    outputs = model.generate([one.prompt for one in rolls], seed=0)
    written = [LABELS["yes"] if one.is_loaded else LABELS["no"] for one in rolls]
    return {
        "right": statistics.mean(output.text == text for output, text in zip(outputs, written, strict=True)),
        "denoising_steps": statistics.mean(sum(output.denoising_steps) for output in outputs),
    }


def milliseconds(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Medians of calls that take turns, so that other work on the machine falls on all alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call(turn)
            taken[name].append(1e3 * (time.process_time() - began))
    return {name: round(statistics.median(values[1:]), 2) for name, values in taken.items()}  # the first one warms up


def draw(rows: Sequence[dict[str, float]], pairs: Sequence[tuple[float, float]], file: Path) -> None:
    """Left: the share of loaded dice by probability. Right: each probability by the exact one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(6.4, 3.2), dpi=90, sharex=True, sharey=True, layout="constrained"
    )
    for axes in (left, right):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axes.set_aspect("equal")
    left.plot([row["mean"] for row in rows], [row["share"] for row in rows], "o-", color="tab:blue", markersize=5)
    left.set_xlabel("probability decided")
    left.set_ylabel("share that is loaded")
    right.plot([exact for _, exact in pairs], [decided for decided, _ in pairs], ".", color="tab:blue", markersize=2)
    right.set_xlabel("exact probability")
    right.set_ylabel("probability decided")
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
    rolls = held_out(arguments.count)
    answers, exact = [one.is_loaded for one in rolls], [one.probability for one in rolls]
    decisions = model.decide([one.prompt for one in rolls], LABELS)
    probabilities = [decision.probabilities["yes"] for decision in decisions]
    others = probabilities_of_yes(model, rolls, seed=1)
    report = {
        "decided": scores(probabilities, answers),
        "exact": scores(exact, answers),
        "mean_difference_from_exact": mean_difference(probabilities, exact),
        "mean_difference_of_another_seed": mean_difference(probabilities, others),
        "least_mass": min(decision.mass for decision in decisions),
        "written": full_answers(model, rolls[:400]),
    }
    print(json.dumps(report, default=float))
    rows = reliability(probabilities, answers)
    for row in rows:
        print(json.dumps({name: round(value, 3) for name, value in row.items()}))
    batch = [one.prompt for one in rolls[:32]]
    calls: dict[str, Callable[[int], object]] = {
        "decision": lambda turn: model.decide(rolls[turn].prompt, LABELS),
        "decisions_of_32": lambda turn: model.decide(batch, LABELS, seed=turn),
        "written_answer": lambda turn: model.generate(rolls[turn].prompt, seed=turn),
    }
    print(json.dumps({"milliseconds_of_cpu_time": milliseconds(calls, arguments.rounds)}))
    if arguments.plot:
        draw(rows, list(zip(probabilities, exact, strict=True)), arguments.plot)


if __name__ == "__main__":
    main()
