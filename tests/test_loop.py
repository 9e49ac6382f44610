"""The loop over a batch of canvases: the same tokens by every driver, no late stop, and what goes wrong."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import pytest
import torch

import dgemma_ext as dg
from backend import BACKEND
from dgemma_ext import SamplerConfig, demo
from dgemma_ext.engine import generation
from dgemma_ext.engine import memory as memory_module
from dgemma_ext.engine.loop import LOOPS
from dgemma_ext.engine.runner import AsyncOutput, EagerRunner
from dgemma_ext.model import Network, PrefillChunk
from dgemma_ext.sampling import (
    CanvasBatch,
    StepBuffers,
    StepOutput,
)
from models import random_model, smallest_model

DTYPES = [torch.float32, torch.bfloat16] if BACKEND == "cpu" else [torch.bfloat16]
SAMPLER = SamplerConfig(max_denoising_steps=6, confidence_threshold=4.0, entropy_bound=6.0, t_max=0.1, t_min=0.01)


@dataclass
class Log:
    """The calls of a loop to its runner: a word for each step, copy and wait."""

    calls: list[str] = field(default_factory=list)


class StreamRunner(EagerRunner):
    """A runner that copies outputs to two buffers by turns, as to pinned memory: an older one is overwritten."""

    def __init__(self, *operands: Any, log: Log) -> None:
        super().__init__(*operands)
        self._log, self._copied = log, 0
        self._copies = [torch.empty_like(self._batch.output) for _ in range(2)]

    def step(self, chunks: Sequence[PrefillChunk] = ()) -> None:
        self._log.calls.append("step")
        super().step(chunks)

    def copy_to_host(self) -> AsyncOutput:
        self._log.calls.append("copy")
        buffer = self._copies[self._copied % 2]
        self._copied += 1
        buffer.copy_(self._batch.output)
        runner = self

        class Waited:
            def wait(self) -> StepOutput:
                runner._log.calls.append("wait")
                return StepOutput.over(buffer, runner._batch.length)

        return Waited()


def scheduler_of(model: dg.DiffusionGemma, driver: str, log: Log, max_batch: int = 4, **options: Any) -> dg.Scheduler:
    make = partial(StreamRunner, log=log)
    return dg.Scheduler(model, max_batch=max_batch, batched=True, driver=driver, make_runner=make, **options)


# The drivers --------------------------------------------------------------------------------------------------------


@cache
def plain(count: int) -> list[dg.Output]:
    model = random_model()
    outputs = model.generate(prompts(count), max_new_tokens=20, sampler=SAMPLER, seed=list(range(count)))
    assert isinstance(outputs, list)
    return outputs


def prompts(count: int) -> list[list[int]]:
    return [[(7 * i + 3 * j) % 500 for j in range(1 + 5 * i % 23)] for i in range(count)]


@pytest.mark.parametrize("driver", list(LOOPS))
@pytest.mark.parametrize("count", [1, 5])
def test_the_same_answers_by_every_driver(driver: str, count: int) -> None:
    scheduler = scheduler_of(random_model(), driver, Log(), max_batch=3, max_length=100)
    requests = [scheduler.submit(p, max_new_tokens=20, sampler=SAMPLER, seed=s) for s, p in enumerate(prompts(count))]
    while not scheduler.idle:
        events = scheduler.finish_canvas()
        assert events
        assert all(isinstance(event, dg.Commit) for event in events)
    assert [request.output for request in requests] == plain(count)


@pytest.mark.parametrize("driver", list(LOOPS))
def test_no_canvas_stops_late_by_more_than_a_step_or_early(driver: str) -> None:
    """With one request every step is a step of its canvas."""
    seen = set()
    for seed in range(12):
        sampler = SamplerConfig(
            max_denoising_steps=5,
            confidence_threshold=5.0,
            stability_threshold=1,
            t_max=0.1,
            t_min=0.01,
            entropy_bound=6.0,
        )
        log = Log()
        scheduler = scheduler_of(random_model(), driver, log, max_batch=1, max_length=100)
        request = scheduler.submit([1, 2, seed], max_new_tokens=16, sampler=sampler, seed=seed)
        for steps in random_model().generate([1, 2, seed], 16, sampler, seed).denoising_steps:  # type: ignore[union-attr]
            del log.calls[:]
            scheduler.finish_canvas()
            assert request.denoising_steps[-1] == steps
            at_cap = steps == 5
            late = driver == "async" and not at_cap
            assert log.calls.count("step") == steps + late, log.calls
            seen.add(at_cap)
            if driver == "async":
                # The next step is queued before the host asks for the last one's flags.
                assert log.calls[:4] == ["step", "copy", "step", "copy"]
            if driver == "graph":
                assert log.calls[-2:] == ["copy", "wait"]
                assert log.calls.count("wait") == 1
        assert request.done
    assert seen == {True, False}


@pytest.mark.parametrize("driver", list(LOOPS))
def test_the_demo_checkpoint_takes_as_many_steps_as_one_by_one(driver: str) -> None:
    model, count = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu"), 8
    puzzles = [demo.draw(6, 20261121, index) for index in range(count)]
    chats: list[Any] = [[{"role": "user", "content": puzzle.text}] for puzzle in puzzles]
    canvases = [demo.pinned_clues(puzzle, model) if index % 2 else None for index, puzzle in enumerate(puzzles)]
    length = model.config.canvas_length
    wanted = model.generate(chats, length, seed=list(range(count)), canvas=canvases)
    scheduler = scheduler_of(model, driver, Log(), max_batch=count, max_length=200)
    requests = [
        scheduler.submit(chat, length, seed=seed, canvas=canvas)
        for seed, (chat, canvas) in enumerate(zip(chats, canvases, strict=True))
    ]
    while not scheduler.idle:
        scheduler.finish_canvas()
    assert [request.output for request in requests] == wanted
    assert len({output.denoising_steps for output in wanted}) > 1


def test_events_of_a_batch_are_those_of_one_by_one() -> None:
    model = random_model()

    def events(batched: bool) -> list[tuple[Any, ...]]:
        scheduler = dg.Scheduler(model, max_batch=3, max_length=100, batched=batched)
        for seed, prompt in enumerate(prompts(4)):
            scheduler.submit(prompt, max_new_tokens=20, sampler=SAMPLER, seed=seed)
        found: list[tuple[Any, ...]] = []
        while not scheduler.idle:
            for event in scheduler.step():
                assert not isinstance(event, dg.Failure)
                extra: tuple[Any, ...] = (event.token_ids, event.canvas_index, event.request.number)
                if isinstance(event, dg.Draft):
                    extra += (event.step, event.accepted.tolist(), event.entropy.tolist(), event.mean_entropy)
                else:
                    extra += (event.text, event.denoising_steps, event.finish_reason)
                found.append((type(event).__name__, *extra))
        return found

    assert events(batched=True) == events(batched=False)


def test_canvases_of_another_length_are_stepped_apart() -> None:
    model = random_model()
    canvases = [None, dg.Canvas([7, 8], [True, True]), dg.Canvas([4] * 8, start_step=3), None]
    samplers = [SAMPLER, SAMPLER, SAMPLER, SamplerConfig(canvas_length=5, max_denoising_steps=4)]
    requests = list(zip(prompts(4), samplers, canvases, strict=True))
    wanted = [model.generate(p, 16, s, seed, canvas=c) for seed, (p, s, c) in enumerate(requests)]
    for driver in LOOPS:
        scheduler = dg.Scheduler(model, max_batch=4, max_length=100, batched=True, driver=driver)
        made = [scheduler.submit(p, 16, s, seed, canvas=c) for seed, (p, s, c) in enumerate(requests)]
        assert set(scheduler._groups) == {5, 8}
        scheduler.step()
        while not scheduler.idle:
            scheduler.finish_canvas()
        assert [request.output for request in made] == wanted
        scheduler.submit([1], 4, SamplerConfig(canvas_length=4))
        assert set(scheduler._groups) == {4, 8}, "buffers of a length that nobody has are given up"


# Rules for seven requests: sets of ids for the whole answer, by position, with pinned tokens, and none.
RULES = [
    dg.Canvas(allowed=[30, 31, 32]),
    None,
    dg.Canvas(allowed=[[4, 9, 300], None, [7], *[[20, 21, 22, 23]] * 5]),
    dg.Canvas([None, 44], [False, True], allowed=list(range(40, 60))),
    dg.Canvas(allowed=[None] * 12 + [[position] for position in range(100, 108)]),
    dg.Canvas([5] * 8, start_step=3, allowed=[5, 6, 7, 511]),
    dg.Canvas(allowed=[[position, position + 50] for position in range(20)]),
]


RULES_SAMPLERS = [replace(SAMPLER, max_denoising_steps=cap) for cap in (6, 3, 5, 2, 6, 4, 1)]


@cache
def each_with_rules_alone() -> list[dg.Output]:
    model = random_model(DTYPES[-1])
    requests = enumerate(zip(prompts(7), RULES_SAMPLERS, RULES, strict=True))
    return [model.generate(p, 12, s, seed, canvas=c) for seed, (p, s, c) in requests]


@pytest.mark.parametrize("batched", [True, False] if BACKEND == "cpu" else [True])
@pytest.mark.parametrize("driver", list(LOOPS))
def test_requests_with_rules_of_their_own_share_their_steps(driver: str, batched: bool) -> None:
    """Seven requests over five slots, so that rows with rules move and are filled again; compared with each alone."""
    rows: list[int] = []

    def make_runner(network: Network, cache: dg.Cache, batch: CanvasBatch, buffers: StepBuffers) -> EagerRunner:
        rows.append(batch.rows)
        return EagerRunner(network, cache, batch, buffers)

    scheduler = dg.Scheduler(random_model(DTYPES[-1]), 5, 100, batched, driver, make_runner)
    requests = enumerate(zip(prompts(7), RULES_SAMPLERS, RULES, strict=True))
    made = [scheduler.submit(p, 12, s, seed, canvas=c) for seed, (p, s, c) in requests]
    while not scheduler.idle:
        scheduler.finish_canvas()
    assert [request.output for request in made] == each_with_rules_alone()
    assert max(rows) == 8, "five rows share a step"
    for request, rule in zip(made, RULES, strict=True):
        if rule is not None and rule.allowed is not None:
            for position, token in enumerate(request.output.token_ids):
                ids = rule.allowed_at(position)
                assert ids is None or token in ids


# What goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", list(LOOPS))
def test_a_row_that_is_not_finite_fails_alone(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    chosen = prompts(3)
    alone = [model.generate(p, max_new_tokens=16, sampler=SAMPLER, seed=s) for s, p in enumerate(chosen)]
    scheduler = dg.Scheduler(model, max_batch=3, max_length=100, batched=True, driver=driver)
    requests = [scheduler.submit(p, max_new_tokens=16, sampler=SAMPLER, seed=s) for s, p in enumerate(chosen)]
    original, steps = EagerRunner.step, []

    def poisoned(runner: EagerRunner, chunks: Sequence[PrefillChunk] = ()) -> None:
        steps.append(1)
        if len(steps) == 2:  # the second step of every first canvas
            runner._batch.state.soft_embedding[1, 3] = float("nan")
        original(runner, chunks)

    monkeypatch.setattr(EagerRunner, "step", poisoned)
    events = []
    while not scheduler.idle:
        events += scheduler.finish_canvas()
    assert [event.request for event in events if isinstance(event, dg.Failure)] == [requests[1]]
    error = requests[1].error
    assert isinstance(error, dg.NonFiniteError)
    assert (error.request, error.step) == (1, 2)
    assert requests[1].denoising_steps == [2]
    assert [requests[i].output for i in (0, 2)] == [alone[0], alone[2]]
    assert scheduler.free_slots == 3


@pytest.mark.parametrize("driver", list(LOOPS))
def test_cancelling_mid_canvas_frees_the_row_and_leaves_the_others(driver: str) -> None:
    model = random_model()
    wanted = plain(3)
    for steps in range(4):
        scheduler = dg.Scheduler(model, max_batch=3, max_length=100, batched=True, driver=driver)
        requests = [scheduler.submit(p, max_new_tokens=20, sampler=SAMPLER, seed=s) for s, p in enumerate(prompts(3))]
        for _ in range(steps):
            scheduler.step()
        assert requests[0].cancel()
        assert not requests[0].cancel()
        assert scheduler.free_slots == (1 if steps else 3)
        assert requests[0] not in scheduler._groups[8].members
        while not scheduler.idle:
            scheduler.finish_canvas()
        assert [request.output for request in requests[1:]] == wanted[1:]
        assert scheduler.free_slots == 3
        assert not scheduler._groups[8].members
        assert (scheduler._groups[8]._batch.slot == -1).all()


def test_a_batch_that_does_not_fit_is_refused_with_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model = smallest_model()
    running = dg.Scheduler(model, max_batch=2, max_length=32, batched=True)
    request = running.submit([1, 2, 3], max_new_tokens=8, seed=5)
    running.step()
    assert model.vision is not None
    plan = memory_module.batch_plan(model.network, 2, 4, 32, slots=2, vision=model.vision.tower.config)
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: plan.total)
    dg.Scheduler(model, max_batch=2, max_length=32, batched=True)
    caches: list[object] = []
    monkeypatch.setattr(model.network, "new_cache", lambda *a: caches.append(a))
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: plan.total - 1)
    with pytest.raises(dg.NotEnoughMemory, match="a batch of 2 takes") as caught:
        dg.Scheduler(model, max_batch=2, max_length=32, batched=True)
    assert caught.value.plan == plan
    assert plan.table() in str(caught.value)
    assert "2 slots of 32 tokens" in plan.table()
    assert not caches, "nothing is made before the refusal"
    # Buffers for another length take as much memory again, while other requests run.
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: 1)
    with pytest.raises(dg.NotEnoughMemory):
        running.submit([1], 8, SamplerConfig(canvas_length=3))
    while not running.idle:
        running.finish_canvas()
    monkeypatch.undo()
    assert request.output == model.generate([1, 2, 3], max_new_tokens=8, seed=5)


def test_an_unknown_driver() -> None:
    with pytest.raises(ValueError, match="driver must be one of eager, async, graph, got 'fast'"):
        dg.Scheduler(smallest_model(), driver="fast")
    with pytest.raises(ValueError, match=r"max_denoising_steps must be an integer in .*, got 0"):
        dg.Scheduler(smallest_model(), batched=True).submit([1], sampler=SamplerConfig(max_denoising_steps=0))


def test_generate_keeps_a_scheduler_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    wanted = [plain(3)[i] for i in range(3)]
    monkeypatch.setattr(generation, "_keeps_schedulers", lambda model: True)
    monkeypatch.setattr(model, "kept_scheduler", None)

    def answer(i: int) -> dg.Output:
        output = model.generate(prompts(3)[i], 20, SAMPLER, seed=i)
        assert isinstance(output, dg.Output)
        return output

    assert answer(0) == wanted[0]
    kept = model.kept_scheduler
    assert kept is not None
    assert (kept.max_batch, kept.cache.max_length) == (1, 1024)
    assert answer(1) == wanted[1]
    assert model.kept_scheduler is kept
    # A stream that is left early frees its row and slot; one that goes on keeps them.
    stream = model.stream(prompts(3)[2], 20, SAMPLER, seed=2)
    assert next(stream).request.number == 0
    assert not kept.idle
    assert answer(0) == wanted[0]
    assert model.kept_scheduler is kept
    stream.close()  # type: ignore[attr-defined]
    assert kept.idle
    assert kept.free_slots == 1
    assert answer(2) == wanted[2]
    assert model.generate(prompts(3), 20, SAMPLER, seed=[0, 1, 2]) == wanted
    assert model.kept_scheduler is not kept
    assert model.kept_scheduler is not None
    assert model.kept_scheduler.max_batch == 4
    busy = dg.Scheduler(model, max_batch=1, max_length=64)
    busy.submit([1], 4)
    assert not busy.claim(model)


def test_a_kept_scheduler_does_not_keep_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_model()
    monkeypatch.setattr(generation, "_keeps_schedulers", lambda model: True)
    model = dg.DiffusionGemma(base.network, base.defaults, base.tokenizer)
    drafts = list(model.stream(prompts(1)[0], 20, SAMPLER))
    assert model.kept_scheduler is not None
    known = weakref.ref(model)
    del model
    assert known() is None, "dropped without a search for cycles"
    assert [event.text for event in drafts if isinstance(event, dg.Draft)]
    # A stream goes on after the caller has dropped its model.
    stream = dg.DiffusionGemma(base.network, base.defaults, base.tokenizer).stream(prompts(1)[0], 20, SAMPLER)
    assert len(list(stream)) == len(drafts)
