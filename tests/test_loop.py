"""A batch of canvases and the loop over it: the same tokens by every driver, finished rows frozen, no late stop."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from typing import Any

import pytest
import torch
from dgemma_ext.model.joint_pass import Pending
from dgemma_ext.sampling.batch_step import batch_step
from dgemma_ext.sampling.canvas_batch import Told, bucket_of, told_bytes

import dgemma_ext as dg
from backend import BACKEND
from dgemma_ext import SamplerConfig, demo
from dgemma_ext.engine import memory as memory_module
from dgemma_ext.engine.loop import DRIVERS, DirectDevice, Look
from dgemma_ext.ops import block_attention
from dgemma_ext.sampling import CanvasBatch, CanvasState, begin_canvas, denoising_step, make_canvas_batch
from models import random_model, smallest_model

DTYPES = [torch.float32, torch.bfloat16] if BACKEND == "cpu" else [torch.bfloat16]
SAMPLER = SamplerConfig(max_denoising_steps=6, confidence_threshold=4.0, entropy_bound=6.0, t_max=0.1, t_min=0.01)


@dataclass
class Log:
    """What a driver asked of the device: a letter for each step, look and wait."""

    calls: list[str] = field(default_factory=list)


class StreamDevice(DirectDevice):
    """A device whose looks land in two buffers by turns, as in pinned memory: an older one is overwritten."""

    def __init__(self, *operands: Any, log: Log) -> None:
        super().__init__(*operands)
        self._log, self._looks = log, 0
        self._buffers = [torch.empty_like(self._batch.told) for _ in range(2)]

    def step(self, pending: Sequence[Pending] = ()) -> None:
        self._log.calls.append("step")
        super().step(pending)

    def look(self) -> Look:
        self._log.calls.append("look")
        buffer = self._buffers[self._looks % 2]
        self._looks += 1
        buffer.copy_(self._batch.told)
        device = self

        class Waited:
            def wait(self) -> Told:
                device._log.calls.append("wait")
                length = device._batch.length
                return Told.over(buffer, buffer.numel() // told_bytes(1, length), length)

        return Waited()


def scheduler_of(model: dg.DiffusionGemma, driver: str, log: Log, max_batch: int = 4, **options: Any) -> dg.Scheduler:
    make = partial(StreamDevice, log=log)
    return dg.Scheduler(model, max_batch=max_batch, batched=True, driver=driver, make_device=make, **options)


# One step of a batch ------------------------------------------------------------------------------------------------


def begun(
    model: dg.DiffusionGemma, cache: dg.Cache, prompts: list[list[int]], caps: list[int], confidence: float = 0.0
) -> list[CanvasState]:
    """A canvas for every prompt, encoded into the slot of its number; with a confidence of 0 it runs to its cap."""
    states = []
    for slot, (prompt, cap) in enumerate(zip(prompts, caps, strict=True)):
        model.encode(torch.tensor([prompt]), cache, slots=[slot])
        settings = SamplerConfig(
            max_denoising_steps=cap, entropy_bound=6.0, t_max=0.1, t_min=0.01, confidence_threshold=confidence
        )
        resolved = settings.resolve(model.defaults, 8)
        content = dg.Canvas([9, None, 11], [True, False, True]) if slot == 1 else None
        states.append(begin_canvas(model, resolved, seed=100 + slot, index=slot, content=content))
    return states


def load(model: dg.DiffusionGemma, cache: dg.Cache, batch: CanvasBatch, states: list[CanvasState]) -> None:
    for row, state in enumerate(states):
        prefix = cache.length(row)
        tables = model.rotary_tables(torch.arange(prefix, prefix + batch.length))
        batch.load(row, state, row, prefix, tables)


def of_row(batch: CanvasBatch, row: int) -> dict[str, torch.Tensor]:
    """A copy of all that a row has."""
    values = {f.name: getattr(batch.state, f.name) for f in fields(CanvasState)}
    return {name: value[row].clone() for name, value in values.items() if value is not None}


PROMPTS = [[1, 2, 3], list(range(20)), [5] * 9]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_steps_every_canvas_as_it_would_be_alone(dtype: torch.dtype) -> None:
    model = random_model(dtype)
    cache = model.new_cache(4, 64)
    states = begun(model, cache, PROMPTS, [2, 5, 4], confidence=4.0)
    batch = make_canvas_batch(model, 4, 8)
    load(model, cache, batch, states)
    for _ in range(5):
        batch_step(model, cache, batch)
        for row, alone in enumerate(states):
            if bool(alone.active):
                denoising_step(model, cache, row, alone)
            for name in ("canvas", "draft", "accepted", "entropy", "mean_entropy", "step", "temperature", "status"):
                assert torch.equal(getattr(alone, name)[0], getattr(batch.state, name)[row]), (row, name)
    assert not batch.state.active.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_finished_row_is_frozen_and_an_empty_one_is_not_read(dtype: torch.dtype) -> None:
    model = random_model(dtype)
    cache = model.new_cache(4, 64)
    batch = make_canvas_batch(model, 4, 8)
    load(model, cache, batch, begun(model, cache, PROMPTS, [1, 2, 6]))
    # Nothing of a row without a request reaches the others: not even a number that is not one.
    batch.logits[3].fill_(float("nan"))
    for tensor in batch.statistics:
        if tensor.is_floating_point():
            tensor[3] = float("nan")
    kept = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    batch_step(model, cache, batch)
    frozen = {0: of_row(batch, 0), 3: of_row(batch, 3)}
    for _ in range(3):
        batch_step(model, cache, batch)
        frozen.setdefault(1, of_row(batch, 1))
        for row, then in frozen.items():
            for name, value in of_row(batch, row).items():
                assert torch.equal(value.reshape(-1).view(torch.uint8), then[name].reshape(-1).view(torch.uint8)), name
    assert batch.state.active.tolist() == [False, False, True, False]
    assert batch.state.step.tolist() == [2, 3, 5, 0]
    assert torch.isfinite(batch.state.mean_entropy).all()
    for tensor, then in zip((*cache.keys, *cache.values), kept, strict=True):
        assert torch.equal(tensor.view(torch.uint8), then.view(torch.uint8)), "a denoising step only reads the cache"


def test_experts_and_attention_see_no_row_that_is_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    cache = model.new_cache(4, 64)
    batch = make_canvas_batch(model, 4, 8)
    load(model, cache, batch, begun(model, cache, PROMPTS, [1, 2, 6]))
    seen, slots = [], []
    original, attention = dg.model.experts, block_attention.canvas_attention

    def spy(rows: torch.Tensor, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((ids.view(4, 8, -1) >= 0).flatten(1).all(1).tolist())
        assert ((ids >= 0).view(4, -1).all(1) | (ids < 0).view(4, -1).all(1)).all()
        return original(rows, ids, *rest)

    def spy_on_slots(*operands: torch.Tensor, **more: Any) -> torch.Tensor:
        slots.append(operands[5].tolist())
        return attention(*operands, **more)

    monkeypatch.setattr(dg.model, "experts", spy)
    monkeypatch.setattr(block_attention, "canvas_attention", spy_on_slots)
    batch_step(model, cache, batch)
    batch_step(model, cache, batch)
    layers = len(model.config.layers)
    assert seen == [[True, True, True, False]] * layers + [[False, True, True, False]] * layers
    assert slots == [[0, 1, 2, -1]] * layers + [[-1, 1, 2, -1]] * layers


def test_a_row_keeps_its_canvas_when_it_moves() -> None:
    model = random_model()
    cache = model.new_cache(4, 64)
    states = begun(model, cache, PROMPTS, [6, 6, 6])
    batch = make_canvas_batch(model, 4, 8)
    load(model, cache, batch, states)
    batch_step(model, cache, batch)
    moved = {**of_row(batch, 2), "tables": next(iter(batch.tables.values()))[0][16:24].clone()}
    batch.move(2, 0)
    batch.clear(2)
    now = {**of_row(batch, 0), "tables": next(iter(batch.tables.values()))[0][:8]}
    assert all(torch.equal(now[name], value) for name, value in moved.items())
    assert batch.slot.tolist() == [2, 1, -1, -1]
    assert batch.prefix_length.tolist()[:2] == [9, 20]
    assert batch.state.active.tolist() == [True, True, False, False]


def test_the_bytes_of_a_batch_are_those_that_it_takes() -> None:
    model = random_model()
    made, counted = make_canvas_batch(model, 4, 8), make_canvas_batch(model, 4, 8, device="meta")
    assert made.nbytes == counted.nbytes
    assert [bucket_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 17, 32)] == [1, 2, 4, 4, 8, 8, 16, 32, 32]


# The drivers --------------------------------------------------------------------------------------------------------


@cache
def plain(count: int) -> list[dg.Output]:
    model = random_model()
    outputs = model.generate(prompts(count), max_new_tokens=20, sampler=SAMPLER, seed=list(range(count)))
    assert isinstance(outputs, list)
    return outputs


def prompts(count: int) -> list[list[int]]:
    return [[(7 * i + 3 * j) % 500 for j in range(1 + 5 * i % 23)] for i in range(count)]


@pytest.mark.parametrize("driver", list(DRIVERS))
@pytest.mark.parametrize("count", [1, 5])
def test_the_same_answers_by_every_driver(driver: str, count: int) -> None:
    scheduler = scheduler_of(random_model(), driver, Log(), max_batch=3, max_length=100)
    requests = [scheduler.submit(p, max_new_tokens=20, sampler=SAMPLER, seed=s) for s, p in enumerate(prompts(count))]
    while not scheduler.idle:
        events = scheduler.finish_canvas()
        assert events
        assert all(isinstance(event, dg.Commit) for event in events)
    assert [request.output for request in requests] == plain(count)


@pytest.mark.parametrize("driver", list(DRIVERS))
def test_no_canvas_stops_late_by_more_than_a_step_or_early(driver: str) -> None:
    """One request, so that every step is a step of its canvas."""
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
            late = driver == "late" and not at_cap
            assert log.calls.count("step") == steps + late, log.calls
            seen.add(at_cap)
            if driver == "late":
                # The next step is under way before the host asks for the last one's flags.
                assert log.calls[:4] == ["step", "look", "step", "look"]
            if driver == "graph":
                assert log.calls[-2:] == ["look", "wait"]
                assert log.calls.count("wait") == 1
        assert request.done
    assert seen == {True, False}


@pytest.mark.parametrize("driver", list(DRIVERS))
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
        told: list[tuple[Any, ...]] = []
        while not scheduler.idle:
            for event in scheduler.step():
                assert not isinstance(event, dg.Failure)
                extra: tuple[Any, ...] = (event.token_ids, event.canvas_index, event.request.number)
                if isinstance(event, dg.Draft):
                    extra += (event.step, event.accepted.tolist(), event.entropy.tolist(), event.mean_entropy)
                else:
                    extra += (event.text, event.denoising_steps, event.finish_reason)
                told.append((type(event).__name__, *extra))
        return told

    assert events(batched=True) == events(batched=False)


def test_requests_that_cannot_share_go_alone_beside_the_batch() -> None:
    model = random_model()
    canvases = [
        None,
        dg.Canvas(allowed=[30, 31, 32]),
        dg.Canvas([7, 8], [True, True]),
        dg.Canvas([4] * 8, start_step=3),
    ]
    samplers = [SAMPLER, SAMPLER, SAMPLER, SamplerConfig(canvas_length=5, max_denoising_steps=4)]
    requests = list(zip(prompts(4), samplers, canvases, strict=True))
    wanted = [model.generate(p, 16, s, seed, canvas=c) for seed, (p, s, c) in enumerate(requests)]
    for driver in DRIVERS:
        scheduler = dg.Scheduler(model, max_batch=4, max_length=100, batched=True, driver=driver)
        made = [scheduler.submit(p, 16, s, seed, canvas=c) for seed, (p, s, c) in enumerate(requests)]
        assert set(scheduler._groups) == {5, 8}
        scheduler.step()
        while not scheduler.idle:
            scheduler.finish_canvas()
        assert [request.output for request in made] == wanted
        scheduler.submit([1], 4, SamplerConfig(canvas_length=4))
        assert set(scheduler._groups) == {4, 8}, "buffers of a length that nobody has are given up"


# What goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", list(DRIVERS))
def test_a_row_that_is_not_finite_fails_alone(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    chosen = prompts(3)
    alone = [model.generate(p, max_new_tokens=16, sampler=SAMPLER, seed=s) for s, p in enumerate(chosen)]
    scheduler = dg.Scheduler(model, max_batch=3, max_length=100, batched=True, driver=driver)
    requests = [scheduler.submit(p, max_new_tokens=16, sampler=SAMPLER, seed=s) for s, p in enumerate(chosen)]
    original, steps = DirectDevice.step, []

    def poisoned(device: DirectDevice, pending: Sequence[Pending] = ()) -> None:
        steps.append(1)
        if len(steps) == 2:  # the second step of every first canvas
            device._batch.state.soft_embedding[1, 3] = float("nan")  # type: ignore[index]
        original(device, pending)

    monkeypatch.setattr(DirectDevice, "step", poisoned)
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


@pytest.mark.parametrize("driver", list(DRIVERS))
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
    plan = memory_module.batch_plan(model, 2, 4, 32, slots=2)
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: plan.total)
    dg.Scheduler(model, max_batch=2, max_length=32, batched=True)
    caches: list[object] = []
    monkeypatch.setattr(model, "new_cache", lambda *a: caches.append(a))
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: plan.total - 1)
    with pytest.raises(dg.NotEnoughMemory, match="a batch of 2 takes") as caught:
        dg.Scheduler(model, max_batch=2, max_length=32, batched=True)
    assert caught.value.plan == plan
    assert plan.table() in str(caught.value)
    assert "2 slots of 32 tokens" in plan.table()
    assert not caches, "nothing is made before the refusal"
    # Buffers for another length are as many bytes again, beside requests that go on.
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: 1)
    with pytest.raises(dg.NotEnoughMemory):
        running.submit([1], 8, SamplerConfig(canvas_length=3))
    while not running.idle:
        running.finish_canvas()
    monkeypatch.undo()
    assert request.output == model.generate([1, 2, 3], max_new_tokens=8, seed=5)


def test_a_driver_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="driver must be one of eager, late, graph, got 'fast'"):
        dg.Scheduler(smallest_model(), driver="fast")
    with pytest.raises(ValueError, match="max_denoising_steps must be at least 1, got 0"):
        dg.Scheduler(smallest_model(), batched=True).submit([1], sampler=SamplerConfig(max_denoising_steps=0))


def test_generate_keeps_a_scheduler_where_graphs_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    wanted = [plain(3)[i] for i in range(3)]
    monkeypatch.setattr(dg.generate, "_keeps_schedulers", lambda model: True)
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
    # A stream that is left early gives its row and its slot back; one that goes on keeps them.
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
    with pytest.raises(RuntimeError, match="numbers must stay different"):
        busy.number_from_zero()


def test_a_kept_scheduler_does_not_keep_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_model()
    monkeypatch.setattr(dg.generate, "_keeps_schedulers", lambda model: True)
    model = dg.DiffusionGemma(base.config, base.weights, base.defaults, base.tokenizer)
    drafts = list(model.stream(prompts(1)[0], 20, SAMPLER))
    assert model.kept_scheduler is not None
    known = weakref.ref(model)
    del model
    assert known() is None, "dropped without a search for cycles"
    assert [event.text for event in drafts if isinstance(event, dg.Draft)]
    # A stream of a model that nobody else has goes on.
    stream = dg.DiffusionGemma(base.config, base.weights, base.defaults, base.tokenizer).stream(
        prompts(1)[0], 20, SAMPLER
    )
    assert len(list(stream)) == len(drafts)
