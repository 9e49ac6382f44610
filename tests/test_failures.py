"""An exception in one request's own part of a step ends that request; the others get the tokens that they get alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import dgemma_ext as dg
from dgemma_ext import RequestState, SamplerConfig
from dgemma_ext.engine import group as group_module
from dgemma_ext.model import Canvases
from models import random_model

SAMPLER = SamplerConfig(max_denoising_steps=3, confidence_threshold=0.0, eos_token_ids=())
PROMPTS = [[3, 4, 5], [6] * 9, [7, 8]]
BROKEN = 1  # the request that fails


def fail_to_begin(model: dg.DiffusionGemma, patch: pytest.MonkeyPatch) -> None:
    """In its second canvas, halfway through filling the row."""
    tables, calls = model.network.rotary_tables, []

    def failing(positions: Any) -> Any:
        if int(positions[0]) == len(PROMPTS[BROKEN]) + 8:
            calls.append(1)
            raise MemoryError("no room")
        return tables(positions)

    patch.setattr(model.network, "rotary_tables", failing)


def fail_to_encode(model: dg.DiffusionGemma, patch: pytest.MonkeyPatch) -> None:
    encode = model.network.encode

    def failing(ids: Any, *rest: Any, **more: Any) -> None:
        encode(ids, *rest, **more)
        if ids.shape[1] == len(PROMPTS[BROKEN]):
            raise MemoryError("no room")

    patch.setattr(model.network, "encode", failing)
    patch.setattr("dgemma_ext.engine.scheduler.MAX_PREFILL_TOKENS", 0)


def fail_to_parse(model: dg.DiffusionGemma, patch: pytest.MonkeyPatch) -> None:
    assert model.tokenizer is not None
    parse = model.tokenizer.parse_response

    def failing(ids: Any, prefix: Any) -> Any:
        if prefix == PROMPTS[BROKEN]:
            raise ValueError("a fault of the parser")
        return parse(ids, prefix=prefix)

    patch.setattr(model.tokenizer, "parse_response", failing)


def fail_to_read_logprobs(model: dg.DiffusionGemma, patch: pytest.MonkeyPatch) -> None:
    read = group_module.canvas_logprobs

    def failing(logits: Any, softcap: float, tokens: Any, pinned: Any, top: int) -> Any:
        if top == BROKEN:
            raise MemoryError("no room")
        return read(logits, softcap, tokens, pinned, top)

    patch.setattr(group_module, "canvas_logprobs", failing)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("fail", [fail_to_begin, fail_to_encode, fail_to_parse, fail_to_read_logprobs])
@pytest.mark.parametrize("advance", ["step", "finish_canvas"])
def test_what_fails_for_one_request_fails_it_alone(
    advance: str,
    fail: Callable[[dg.DiffusionGemma, pytest.MonkeyPatch], None],
    batched: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model()
    alone = [model.generate(prompt, 16, SAMPLER, seed=i, logprobs=i) for i, prompt in enumerate(PROMPTS)]
    scheduler = dg.Scheduler(model, 2, 60, batched=batched)
    fail(model, monkeypatch)
    requests = [scheduler.submit(prompt, 16, SAMPLER, i, logprobs=i) for i, prompt in enumerate(PROMPTS)]
    failures = []
    while not scheduler.idle:
        failures += [event for event in getattr(scheduler, advance)() if isinstance(event, dg.Failure)]
    assert [event.request.number for event in failures] == [BROKEN]
    assert isinstance(failures[0].error.__cause__, MemoryError | ValueError)
    assert [request.state for request in requests].count(RequestState.FAILED) == 1
    for number in (0, 2):
        assert requests[number].output == alone[number]
    with pytest.raises(RuntimeError, match=r"a step was broken off: (MemoryError|ValueError)"):
        _ = requests[BROKEN].output
    monkeypatch.undo()
    assert scheduler.free_slots == 2
    again = scheduler.submit(PROMPTS[BROKEN], 16, SAMPLER, BROKEN, logprobs=BROKEN)
    while not scheduler.idle:
        scheduler.step()
    assert again.output == alone[BROKEN]


@pytest.mark.parametrize("batched", [False, True])
def test_a_pass_that_fails_ends_the_requests_that_share_it(batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are stepped by turns share none. The exception of a shared pass reaches the caller of `step`."""
    model = random_model()
    alone = [model.generate(prompt, 8, SAMPLER, seed=i) for i, prompt in enumerate(PROMPTS)]
    scheduler = dg.Scheduler(model, 2, 60, batched=batched)
    requests = [scheduler.submit(prompt, 8, SAMPLER, i) for i, prompt in enumerate(PROMPTS)]
    original, passes = model.network.forward, []

    def failing(cache: dg.Cache, canvases: Canvases, *rest: Any) -> Any:
        passes.append(1)
        if len(passes) == 2:
            raise MemoryError("no room")
        return original(cache, canvases, *rest)

    monkeypatch.setattr(model.network, "forward", failing)
    events: list[dg.Event] = []
    raised = 0
    while not scheduler.idle:
        try:
            events += scheduler.step()
        except MemoryError:
            raised += 1
    broken = [0, 1] if batched else [1]
    assert raised == int(batched)
    failures = [event for event in events if isinstance(event, dg.Failure)]
    assert [event.request.number for event in failures] == broken
    for number in set(range(3)) - set(broken):
        assert requests[number].output == alone[number]
    assert scheduler.free_slots == 2
