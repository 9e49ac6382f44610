"""Checks of the example itself: pytest examples/decisions (needs transformers)."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import dgemma_ext as dg
import train_dice
from dgemma_ext import demo
from dgemma_ext.engine import decision_canvas
from dice import Rolls, held_out
from evaluate_dice import reliability, scores


def test_the_exact_probability_is_bayes_rule() -> None:
    assert Rolls("", True).probability == 0.5
    # A six has 6/20 on the loaded die and 1/6 on the fair one.
    assert Rolls("6", True).probability == pytest.approx((6 / 20) / (6 / 20 + 1 / 6))
    assert Rolls("61", True).probability == pytest.approx(0.3 * 0.1 / (0.3 * 0.1 + 1 / 36))
    assert Rolls("1" * 200, False).probability == pytest.approx(0)


def test_the_exact_probability_is_calibrated() -> None:
    rolls = held_out(4000)
    assert rolls == held_out(4000) != held_out(4000, seed=1)
    exact, answers = [one.probability for one in rolls], [one.is_loaded for one in rolls]
    found = scores(exact, answers)
    assert found["calibration_error"] < 0.03
    assert found["log_loss"] < math.log(2)
    turned = [1 - p for p in exact]
    assert scores(turned, answers)["calibration_error"] > 0.2
    assert sum(row["count"] for row in reliability(exact, answers)) == 4000


def test_training_has_the_canvas_of_a_decision() -> None:
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")
    assert model.tokenizer is not None
    held = decision_canvas("{}", model.tokenizer, model.defaults, model.config.canvas_length)
    rolls = held_out(3)
    trained = train_dice.answers_of(rolls, train_dice.CANVAS)
    level = train_dice.decision_level(trained)
    assert held.length == train_dice.CANVAS
    assert [bool(level[0, place] == 0) for place in range(held.length)] == list(held.canvas.pinned or ())
    for row in train_dice.corrupted(trained, level).tolist():
        assert all(token in (None, own) for token, own in zip(held.canvas.tokens, row, strict=True))
