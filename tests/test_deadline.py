"""Deadlines: an answer ends with the draft at hand when its time is up. Time is a counter that the tests move."""

from __future__ import annotations

from typing import Any

import pytest

import dgemma_ext as dg
from dgemma_ext import SamplerConfig
from models import random_model

# Never settles before its cap.
STEADY = SamplerConfig(max_denoising_steps=6, confidence_threshold=0.0, eos_token_ids=())


class Clock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def drafts_of(model: dg.DiffusionGemma, prompt: list[int], length: int) -> list[dg.Draft]:
    drafts: list[dg.Draft] = []
    model.generate(prompt, length, STEADY, seed=1, on_draft=drafts.append)
    return drafts


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_the_draft_at_hand_ends_the_answer(at: int, batched: bool) -> None:
    model, clock = random_model(), Clock()
    scheduler = dg.Scheduler(model, 2, 60, batched=batched, clock=clock)
    timed = scheduler.submit([3, 4], 16, STEADY, seed=1, deadline=at, logprobs=0)
    free = scheduler.submit([3, 4], 16, STEADY, seed=1)
    original = drafts_of(model, [3, 4], 16)
    commits = []
    while not scheduler.idle:
        clock.now += 1
        commits += [event for event in scheduler.step() if isinstance(event, dg.Commit) and event.request is timed]
    assert timed.output.finish_reason == "deadline"
    assert timed.output.denoising_steps == (at,)
    assert timed.output.token_ids == original[at - 1].token_ids
    assert [(commit.finish_reason, commit.denoising_steps) for commit in commits] == [("deadline", at)]
    assert timed.output.logprobs is not None
    assert len(timed.output.logprobs) == 8
    assert free.output == model.generate([3, 4], 16, STEADY, seed=1)
    assert scheduler.free_slots == 2


@pytest.mark.parametrize("advance", ["step", "finish_canvas"])
def test_one_step_is_made_at_least_and_waiting_counts(advance: str) -> None:
    model, clock = random_model(), Clock()
    scheduler = dg.Scheduler(model, 1, 60, clock=clock)
    first = scheduler.submit([3, 4], 8, STEADY)
    late = scheduler.submit([5], 16, STEADY, deadline=2)
    clock.now += 10
    while not scheduler.idle:
        getattr(scheduler, advance)()
    assert first.output.finish_reason == "length"
    assert late.output.denoising_steps == (1,)
    assert late.output.finish_reason == "deadline"


@pytest.mark.parametrize("driver", ["eager", "graph"])
def test_finish_canvas_looks_at_the_clock_after_every_step(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = random_model(), Clock()
    scheduler = dg.Scheduler(model, 1, 60, clock=clock, driver=driver)
    request = scheduler.submit([3, 4], 16, STEADY, seed=1, deadline=3)
    original = model.network.forward

    def timed(*arguments: Any) -> Any:
        clock.now += 1
        return original(*arguments)

    monkeypatch.setattr(model.network, "forward", timed)
    events = scheduler.finish_canvas()
    assert [type(event) for event in events] == [dg.Commit]
    assert request.output.denoising_steps == (3,)


def test_time_that_is_up_between_canvases_and_tokens_after_the_end() -> None:
    """A canvas that has settled is kept as it is; no other begins. What follows an end of text is cut as usual."""
    model, clock = random_model(), Clock()
    scheduler = dg.Scheduler(model, 1, 60, clock=clock)
    request = scheduler.submit([3, 4], 24, STEADY, seed=1, deadline=6)
    while not scheduler.idle:
        clock.now += 1
        scheduler.step()
    assert request.output.finish_reason == "deadline"
    assert request.output.denoising_steps == (6,)

    draft = drafts_of(model, [3, 4], 8)[1]
    ending = SamplerConfig(max_denoising_steps=6, confidence_threshold=0.0, eos_token_ids=(draft.token_ids[4],))
    cut = scheduler.submit([3, 4], 8, ending, seed=1, deadline=2)
    while not scheduler.idle:
        clock.now += 1
        scheduler.step()
    end = draft.token_ids.index(draft.token_ids[4]) + 1
    assert cut.output.token_ids == draft.token_ids[:end]
    assert cut.output.finish_reason == "deadline"


def test_generate_takes_one_deadline_or_one_for_each() -> None:
    model = random_model()
    outputs = model.generate([[3], [4]], 8, STEADY, seed=[1, 2], deadline=[0, None])
    assert [output.finish_reason for output in outputs] == ["deadline", "length"]
    assert model.generate([3], 8, STEADY, deadline=0).denoising_steps == (1,)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "5", True])
def test_bad_deadlines_are_refused(value: Any) -> None:
    scheduler = dg.Scheduler(random_model(), 1, 30)
    with pytest.raises(ValueError, match="deadline must be a finite number"):
        scheduler.submit([1], 4, deadline=value)
    assert scheduler.idle
