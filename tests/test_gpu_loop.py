"""The loop of a canvas on a GPU: captured steps and the WHILE node give the tokens of single steps, without waits."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import dgemma_ext as dg
from dgemma_ext import _C, SamplerConfig, demo
from dgemma_ext.engine import scheduler as scheduler_module
from dgemma_ext.engine.cuda_graphs import CudaEagerRunner, CudaGraphRunner
from dgemma_ext.engine.loop import LOOPS

pytestmark = pytest.mark.gpu

PUZZLES = 6
# Every canvas runs to this cap, so that a batch keeps its size and with it the bits of its dense products.
TO_THE_CAP = SamplerConfig(max_denoising_steps=7, confidence_threshold=0.0)


# With this package's products a row's bits depend on that row alone. cuBLAS may choose its algorithm by the stream and
# its workspace, so with torch's products a captured step may round otherwise than one that is launched. They come
# second: where only they differ, cuBLAS is the reason.
products = pytest.mark.parametrize("batch_invariant", [True, False], ids=["own products", "torch's products"])


def model(batch_invariant: bool = True) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cuda", batch_invariant=batch_invariant)


def assert_same(found: dict[str, Any], batch_invariant: bool) -> None:
    """By every driver. Two of them capture the same step in the same stream, so cuBLAS chooses alike."""
    assert found["graph"] == found["async"]
    reason = "as with torch's products it may" if not batch_invariant else "and cuBLAS is not the reason"
    assert found["async"] == found["eager"], f"a captured step differs from one that is launched, {reason}"


def chats(count: int) -> list[Any]:
    return [[{"role": "user", "content": demo.draw(6, 20261121, index).text}] for index in range(count)]


def answers(scheduler: dg.Scheduler, count: int, sampler: SamplerConfig | None) -> list[dg.Output]:
    length = scheduler.network.config.canvas_length
    requests = [scheduler.submit(chat, length, sampler, seed) for seed, chat in enumerate(chats(count))]
    while not scheduler.idle:
        scheduler.finish_canvas()
    return [request.output for request in requests]


@contextmanager
def no_fallback() -> Iterator[None]:
    """What is said once where steps are not captured, or not repeated by the device, is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@products
def test_the_same_tokens_by_every_driver_alone(batch_invariant: bool) -> None:
    made = model(batch_invariant)
    with no_fallback():
        found = {
            driver: [
                answers(dg.Scheduler(made, 1, 256, driver=driver), 1, SamplerConfig(max_denoising_steps=cap))
                for cap in (1, 4, 48)
            ]
            for driver in LOOPS
        }
    assert_same(found, batch_invariant)


@products
@pytest.mark.parametrize("count", [3, 4])
def test_the_same_tokens_by_every_driver_in_a_batch(count: int, batch_invariant: bool) -> None:
    made = model(batch_invariant)
    with no_fallback():
        found = {driver: answers(dg.Scheduler(made, count, 256, driver=driver), count, TO_THE_CAP) for driver in LOOPS}
    assert {output.denoising_steps for output in found["eager"]} == {(7,)}
    assert_same(found, batch_invariant)


@products
def test_rules_of_every_request_hold_in_captured_steps(batch_invariant: bool) -> None:
    """Seven requests with allowed sets of their own, by the whole answer and by position, and one without."""
    made = model(batch_invariant)
    length, digits = made.config.canvas_length, made.tokenizer.encode("123456")  # type: ignore[union-attr]
    rules: list[dg.Canvas | None] = [
        *(dg.Canvas(allowed=digits[: 2 + n]) for n in range(4)),
        None,
        dg.Canvas(allowed=[[digits[i % 6]] if i % 2 else None for i in range(length)]),
        dg.Canvas(allowed=[[digits[0], digits[5]]] * length),
    ]
    found = {}
    for driver in LOOPS:
        scheduler = dg.Scheduler(made, 7, 256, driver=driver)
        requests = [
            scheduler.submit(chat, length, TO_THE_CAP, seed, canvas=canvas)
            for seed, (chat, canvas) in enumerate(zip(chats(7), rules, strict=True))
        ]
        while not scheduler.idle:
            scheduler.finish_canvas()
        found[driver] = [request.output for request in requests]
    for output, canvas in zip(found["eager"], rules, strict=True):
        for position, token in enumerate(output.token_ids):
            allowed = None if canvas is None else canvas.allowed_at(position)
            assert allowed is None or token in allowed
    assert_same(found, batch_invariant)


@products
def test_grammars_of_every_request_hold_in_captured_steps(batch_invariant: bool) -> None:
    """Of several sizes, beside requests without one. The second round has one that is larger than all before, and the
    third none: what the others left in the tensors is not read."""
    made = model(batch_invariant)
    length = made.config.canvas_length
    rounds: list[list[str | None]] = [
        [r"[1-6]{36}", None, r"(ab|c)*d{3,20}", r"[A-Z]{2}[0-9]{4}"],
        [None, r"([a-f]{3}[0-9]{2}){1,6}x?", r"[1-6]{36}", None],
        [None] * 4,
    ]
    found: dict[str, list[dg.Output]] = {}
    for driver in LOOPS:
        scheduler, found[driver] = dg.Scheduler(made, 4, 256, driver=driver), []
        for expressions in rounds:
            grammars = [None if one is None else dg.Regex(one) for one in expressions]
            requests = [
                scheduler.submit(chat, length, TO_THE_CAP, seed, grammar=grammar)
                for seed, (chat, grammar) in enumerate(zip(chats(4), grammars, strict=True))
            ]
            while not scheduler.idle:
                scheduler.finish_canvas()
            found[driver] += [request.output for request in requests]
    for output, expression in zip(found["eager"], [one for each in rounds for one in each], strict=True):
        assert expression is None or re.fullmatch(expression, output.text)
    assert_same(found, batch_invariant)


def test_a_batch_in_which_rows_finish_solves_as_many_puzzles() -> None:
    """Tokens may differ from one by one: the bits of a dense product depend on the rows of the batch."""
    made = model(batch_invariant=False)
    alone = [made.generate(chat, made.config.canvas_length, seed=seed) for seed, chat in enumerate(chats(PUZZLES))]
    solved = [
        sum(demo.check(output.text, puzzle) for output, puzzle in zip(side, texts(), strict=True))
        for side in (alone, answers(dg.Scheduler(made, PUZZLES, 256), PUZZLES, None))
    ]
    assert abs(solved[0] - solved[1]) <= 1, solved


def texts() -> list[str]:
    return [demo.draw(6, 20261121, index).text for index in range(PUZZLES)]


@pytest.mark.parametrize("driver", ["async", "graph"])
def test_a_canvas_allocates_nothing_and_waits_for_nothing_but_its_outputs(driver: str) -> None:
    made = model()
    scheduler = dg.Scheduler(made, 3, 256, driver=driver)
    answers(scheduler, 3, TO_THE_CAP)  # captures
    for seed, chat in enumerate(chats(3)):
        scheduler.submit(chat, made.config.canvas_length, TO_THE_CAP, seed)
    scheduler.step()
    (group,) = scheduler._groups.values()
    assert isinstance(group.runner(), CudaGraphRunner)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        progress = group.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    assert [one.num_steps for one in progress.values()] == [7, 7, 7]
    for counter in ("allocation.all.allocated", "segment.all.allocated", "num_alloc_retries"):
        assert after[counter] == before[counter], counter


def test_schedulers_of_two_streams_and_threads_take_turns() -> None:
    """Their graphs share the memory of a step's intermediate values."""
    made = model()
    wanted = answers(dg.Scheduler(made, 3, 256), 3, TO_THE_CAP)
    torch.cuda.synchronize()
    found: dict[int, list[list[dg.Output]]] = {}

    def serve(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            scheduler = dg.Scheduler(made, 3, 256)
            found[number] = [answers(scheduler, 3, TO_THE_CAP) for _ in range(10)]

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [wanted] * 10, 1: [wanted] * 10}


def test_a_step_of_a_request_gives_every_draft() -> None:
    made = model()
    drafts: list[dg.Draft] = []
    output = made.generate(chats(1)[0], made.config.canvas_length, TO_THE_CAP, 0, None, drafts.append)
    assert [draft.step for draft in drafts] == [1, 2, 3, 4, 5, 6, 7]
    assert drafts[-1].token_ids[: len(output.token_ids)] == output.token_ids
    assert made.generate(chats(1)[0], made.config.canvas_length, TO_THE_CAP, 0) == output


def test_a_step_that_cannot_be_captured_runs_launch_by_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    wanted = answers(dg.Scheduler(made, 1, 256), 1, TO_THE_CAP)
    monkeypatch.setenv("DGEMMA_SYNC", "1")
    scheduler = dg.Scheduler(made, 1, 256)
    assert answers(scheduler, 1, TO_THE_CAP) == wanted
    (group,) = scheduler._groups.values()
    assert type(group._runners[1]) is CudaEagerRunner


def test_without_a_device_loop_the_host_drives(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    wanted = answers(dg.Scheduler(made, 1, 256), 1, TO_THE_CAP)

    def refuse(*_: int) -> None:
        raise RuntimeError("dgemma::GraphLoop: no")

    monkeypatch.setattr(_C, "GraphLoop", refuse)
    with pytest.warns(RuntimeWarning, match="one ahead: dgemma::GraphLoop: no"):
        assert answers(dg.Scheduler(made, 1, 256), 1, TO_THE_CAP) == wanted


def test_batch_invariant_changes_no_bit() -> None:
    made = model()
    alone = []
    for seed, chat in enumerate(chats(5)):
        scheduler = dg.Scheduler(made, 1, 256)
        request = scheduler.submit(chat, made.config.canvas_length, None, seed)
        while not scheduler.idle:
            scheduler.finish_canvas()
        alone.append(request.output)
    assert answers(dg.Scheduler(made, 5, 256), 5, None) == alone


def test_encoding_in_the_first_step_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    in_the_first_step = answers(dg.Scheduler(made, 3, 256), 3, None)
    monkeypatch.setattr(scheduler_module, "MAX_PREFILL_TOKENS", 0)
    assert answers(dg.Scheduler(made, 3, 256), 3, None) == in_the_first_step
