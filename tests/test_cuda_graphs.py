"""What drives a GPU's steps, over stand-ins for what torch has of CUDA: graphs, looks, and doing without either."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

import dgemma_ext as dg
from adapter_folders import SETTINGS, experts_tensors, random_tensors
from dgemma_ext import _C, demo
from dgemma_ext.engine import cuda_graphs
from dgemma_ext.engine.loop import LOOPS
from dgemma_ext.model import MatmulMode, Network
from dgemma_ext.sampling.adapter_rows import AdapterRows
from dgemma_ext.sampling.constraint import Constraint, Constraints
from models import random_model
from test_loop import SAMPLER, plain, prompts


class StandIn:
    """A stream, an event and a context: everything has happened when it is asked for."""

    cuda_stream = 0

    def __init__(self, *_: object) -> None: ...

    def record(self, _stream: object) -> None: ...

    def wait_stream(self, _other: object) -> None: ...

    def synchronize(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Graph:
    """A captured step, and by its address the step that a loop repeats."""

    by_address: ClassVar[dict[int, Graph]] = {}

    def __init__(self, _place: object, step: Callable[[], None]) -> None:
        self.replay = step
        self.by_address[id(self)] = self

    def raw_cuda_graph(self) -> int:
        return id(self)


class GraphWithoutUpdates(Graph):
    """A captured step that finds the adapters of its rows written, as a GPU's must: no host writes while it runs."""

    is_running: ClassVar[bool] = False

    def __init__(self, place: object, step: Callable[[], None]) -> None:
        def run() -> None:
            GraphWithoutUpdates.is_running = True
            step()
            GraphWithoutUpdates.is_running = False

        super().__init__(place, run)

    @classmethod
    def updated(cls, update: Callable[[AdapterRows], None]) -> Callable[[AdapterRows], None]:
        def checked(rows: AdapterRows) -> None:
            before = (rows.version, rows._written)
            update(rows)
            assert not cls.is_running or before == (rows.version, rows._written)

        return checked


class GraphLoop:
    """csrc/cuda/graph_loop.cu in Python, over the same addresses."""

    def __init__(self, step: int, active: int, slot: int, rows: int, steps_left: int) -> None:
        self.step = Graph.by_address[step].replay
        self.active = (ctypes.c_uint8 * rows).from_address(active)
        self.slot = (ctypes.c_int32 * rows).from_address(slot)
        self.left = ctypes.c_int32.from_address(steps_left)

    def launch(self, stream: int) -> None:
        assert stream == 0
        again = True
        while again:
            self.step()
            self.left.value -= 1
            again = all(s < 0 or a for s, a in zip(self.slot, self.active, strict=True)) and self.left.value > 0


@pytest.fixture
def cuda_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("device", "current_stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, StandIn)
    monkeypatch.setattr(cuda_graphs, "can_capture", lambda network: True)
    place = cuda_graphs._CapturePlace(torch.device("cpu"), *([StandIn()] * 4))  # type: ignore[arg-type]
    monkeypatch.setattr(cuda_graphs, "_capture_place", lambda device: place)
    monkeypatch.setattr(cuda_graphs, "_captured", Graph)
    monkeypatch.setattr(cuda_graphs, "_pinned_like", torch.empty_like)
    monkeypatch.setattr(_C, "GraphLoop", GraphLoop, raising=False)
    cuda_graphs._warn_once.cache_clear()


def answers_of(driver: str) -> tuple[list[dg.Output], dict[int, Any]]:
    make = cuda_graphs.CudaEagerRunner if driver == "eager" else cuda_graphs.cuda_runner
    scheduler = dg.Scheduler(random_model(), 3, 100, batched=True, driver=driver, make_runner=make)
    requests = [scheduler.submit(p, 20, SAMPLER, s) for s, p in enumerate(prompts(5))]
    scheduler.step()
    while not scheduler.idle:
        scheduler.finish_canvas()
    return [request.output for request in requests], scheduler._groups[8]._runners


@pytest.mark.usefixtures("cuda_on_the_host")
@pytest.mark.parametrize("driver", list(LOOPS))
def test_the_runners_of_a_gpu_give_the_same_answers(driver: str) -> None:
    found, runners = answers_of(driver)
    assert found == plain(5)
    assert set(runners) == {1, 2, 4}, "a batch shrinks as requests end"
    assert {type(runner) for runner in runners.values()} == {
        cuda_graphs.CudaEagerRunner if driver == "eager" else cuda_graphs.CudaGraphRunner
    }
    assert all(runner.repeats is (driver != "eager") for runner in runners.values())


@pytest.mark.usefixtures("cuda_on_the_host")
def test_all_batch_sizes_are_captured_when_a_scheduler_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture waits for the whole GPU, so none may fall into the time of requests. The largest takes memory once."""
    captured: list[int] = []

    class Counted(cuda_graphs.CudaGraphRunner):
        def __init__(self, *operands: Any) -> None:
            captured.append(operands[2].rows)
            super().__init__(*operands)

    monkeypatch.setattr(cuda_graphs, "CudaGraphRunner", Counted)
    scheduler = dg.Scheduler(random_model(), 5, 100, batched=True, make_runner=cuda_graphs.cuda_runner)
    assert captured == [8, 4, 2, 1]
    requests = [scheduler.submit(p, 20, SAMPLER, s) for s, p in enumerate(prompts(5))]
    while not scheduler.idle:
        scheduler.finish_canvas()
    assert [request.output for request in requests] == plain(5)
    assert captured == [8, 4, 2, 1]
    scheduler.submit([1, 2, 3], 20, replace(SAMPLER, canvas_length=5))
    scheduler.finish_canvas()
    assert captured == [8, 4, 2, 1, 1], "of another length only what is needed"


@pytest.mark.usefixtures("cuda_on_the_host")
@pytest.mark.parametrize("missing", ["loops", "launch", "graphs", "kernels"])
def test_what_a_driver_does_not_have_is_told_once_and_done_without(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("not here")

    if missing == "kernels":
        monkeypatch.setattr(cuda_graphs, "can_capture", lambda network: False)
    elif missing == "graphs":
        monkeypatch.setattr(cuda_graphs, "_captured", refuse)
    elif missing == "loops":
        monkeypatch.setattr(_C, "GraphLoop", refuse)
    else:
        monkeypatch.setattr(GraphLoop, "launch", refuse)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, runners = answers_of("graph")
    assert found == plain(5)
    assert not any(runner.repeats for runner in runners.values())
    one_ahead = ["the host queues every denoising step by itself, one ahead: not here"]
    wanted = {
        "loops": one_ahead,
        "launch": one_ahead,
        "graphs": ["a denoising step could not be captured in a CUDA graph, so it runs launch by launch: not here"],
        "kernels": [],
    }
    assert [str(warning.message) for warning in told] == wanted[missing]


# Grammars -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cuda_on_the_host")
@pytest.mark.parametrize("driver", list(LOOPS))
def test_rows_with_grammars_are_captured_when_they_come(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step reads grammars where they lie; one that is larger than all before it is captured anew."""
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")
    prompts, length = [demo.draw(6, seed).text for seed in range(2)], model.config.canvas_length
    sampler = dg.SamplerConfig(max_denoising_steps=4, confidence_threshold=0.0)
    captured: list[bool] = []
    capture = cuda_graphs.CudaGraphRunner._capture

    def counted(self: cuda_graphs.CudaGraphRunner, constrained: bool, adapted: bool) -> Any:
        captured.append(constrained)
        return capture(self, constrained, adapted)

    monkeypatch.setattr(cuda_graphs.CudaGraphRunner, "_capture", counted)
    make = cuda_graphs.CudaEagerRunner if driver == "eager" else cuda_graphs.cuda_runner
    scheduler = dg.Scheduler(model, 2, 200, batched=True, driver=driver, make_runner=make)
    rounds: list[tuple[list[str | None], int]] = [
        ([None, None], 0),
        (["[1-6]{20}", None], 1),
        (["[ab]{6}", "[1-6]{20}"], 0),
        ([None, "([a-f]{3}[0-9]{2}){1,7}x?"], 1),
        ([None, None], 0),
    ]
    for expressions, captures in rounds:
        before = len(captured)
        grammars = [None if one is None else dg.Regex(one) for one in expressions]
        requests = [
            scheduler.submit(prompt, length, sampler, seed, grammar=grammar)
            for seed, (prompt, grammar) in enumerate(zip(prompts, grammars, strict=True))
        ]
        while not scheduler.idle:
            scheduler.step()
        new = captured[before:] if before else captured[2:]
        assert new == [True] * (captures if driver != "eager" else 0), expressions
        for seed, request in enumerate(requests):
            assert request.output == model.generate(prompts[seed], length, sampler, seed, grammar=grammars[seed])


@pytest.mark.usefixtures("cuda_on_the_host")
def test_rows_with_grammars_run_launch_by_launch_where_they_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")
    scheduler = dg.Scheduler(model, 2, 200, batched=True, driver="graph", make_runner=cuda_graphs.cuda_runner)

    def refuse(*_: object) -> None:
        raise RuntimeError("not here")

    monkeypatch.setattr(cuda_graphs, "_captured", refuse)
    prompt, sampler, grammar = demo.draw(6, 0).text, dg.SamplerConfig(max_denoising_steps=3), dg.Regex("[ab]{6}")
    request = scheduler.submit(prompt, 20, sampler, 5, grammar=grammar)
    with pytest.warns(RuntimeWarning, match="with grammars could not be captured, so it runs launch by launch: not"):
        scheduler.finish_canvas()
    while not scheduler.idle:
        scheduler.finish_canvas()
    assert request.output == model.generate(prompt, 20, sampler, 5, grammar=grammar)


@pytest.mark.usefixtures("cuda_on_the_host")
@pytest.mark.parametrize("driver", list(LOOPS))
def test_rows_with_adapters_are_captured_when_they_come(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step reads each row's factors by an index on the device; it is captured anew when adapters are loaded,
    and not at all with one of experts, whose operators depend on the routing."""
    base = random_model()
    model = dg.DiffusionGemma(Network(base.config, base.weights, MatmulMode.BATCHED), base.defaults, base.tokenizer)
    for name, tensors in (("one", random_tensors(base.config, 1)), ("two", random_tensors(base.config, 2))):
        model.load_adapter(name, dg.Adapter.from_tensors(SETTINGS, tensors, base.config))
    sampler = replace(SAMPLER, max_denoising_steps=3)  # in which roundings do not grow to other tokens
    captured: list[tuple[bool, bool]] = []
    capture = cuda_graphs.CudaGraphRunner._capture

    def counted(self: cuda_graphs.CudaGraphRunner, constrained: bool, adapted: bool) -> Any:
        captured.append((constrained, adapted))
        return capture(self, constrained, adapted)

    monkeypatch.setattr(cuda_graphs.CudaGraphRunner, "_capture", counted)
    if driver != "eager":
        monkeypatch.setattr(cuda_graphs, "_captured", GraphWithoutUpdates)
        monkeypatch.setattr(AdapterRows, "update", GraphWithoutUpdates.updated(AdapterRows.update))
    make = cuda_graphs.CudaEagerRunner if driver == "eager" else cuda_graphs.cuda_runner
    scheduler = dg.Scheduler(model, 2, 100, batched=True, driver=driver, make_runner=make, prefix_cache_bytes=1 << 24)
    both = (False, True)
    rounds: list[tuple[list[str | None], list[tuple[bool, bool]]]] = [
        ([None, None], []),
        (["one", "two"], [both]),
        (["two", None], []),
        (["three", "one"], [both]),
        (["experts", "one"], []),
        ([None, None], []),
        # All of it is in the prefix cache, so that no step with tokens to encode comes before the captured one.
        (["one", "two"], [both]),
    ]
    for names, new in rounds:
        if "three" in names:
            adapter = dg.Adapter.from_tensors(SETTINGS, random_tensors(base.config, 3), base.config)
            model.load_adapter("three", adapter)
        if "experts" in names:
            tensors = experts_tensors(base.config, scale=0.1)
            model.load_adapter("experts", dg.Adapter.from_tensors(SETTINGS, tensors, base.config))
        before = len(captured)
        requests = [
            scheduler.submit(p, 16, sampler, s, adapter=n)
            for s, (p, n) in enumerate(zip(prompts(2), names, strict=True))
        ]
        while not scheduler.idle:
            scheduler.finish_canvas()
        assert captured[before or 2 :] == (new if driver != "eager" else []), names
        for seed, (request, name) in enumerate(zip(requests, names, strict=True)):
            assert request.output == model.generate(prompts(2)[seed], 16, sampler, seed, adapter=name)


def test_the_tensors_of_grammars_stay_where_they_are() -> None:
    """Until a grammar comes that is larger than all before: then a step that reads them is captured anew."""
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")
    small, other, large = (model.compile(dg.Regex(one)) for one in ("[ab]{5}", "[cd]{4}", "([a-f]{3}[0-9]{2}){1,7}x?"))
    held = Constraints(2, torch.device("cpu"))

    def places() -> tuple[int, list[int]]:
        held.update()
        rows = held.rows_between(0, 2)
        return held.version, [tensor.data_ptr() for tensor in rows[:4]]

    held.place(0, Constraint(small, small.start, 7))
    before = places()
    held.clear(0)
    held.place(1, Constraint(other, 2, 3))
    assert places() == before
    rows = held.rows_between(1, 2)
    assert [int(rows.state), int(rows.tokens_left), int(rows.descriptor[0, 0])] == [2, 3, other.states]
    assert held.rows_between(0, 1).descriptor.abs().sum() == 0
    held.move(1, 0)
    held.place(1, Constraint(large, large.start, 0))
    assert places()[0] == before[0] + 1
    assert [int(count) for count in held.rows_between(0, 2).descriptor[:, 0]] == [other.states, large.states]
    assert held.any_between(0, 1)
    held.clear(0)
    assert not held.any_between(0, 1)


# Turns ----------------------------------------------------------------------------------------------------------------


class Stream:
    """A stream that tells which others it waits for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        self.cuda_stream = hash(name)

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def place_on(streams: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> cuda_graphs._CapturePlace:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: streams())
    return cuda_graphs._CapturePlace(torch.device("cpu"), *([StandIn()] * 4))  # type: ignore[arg-type]


def test_graphs_of_two_streams_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the memory of their steps; in one stream they follow each other anyhow."""
    log: list[str] = []
    one, other = Stream("one", log), Stream("other", log)
    current = one
    place = place_on(lambda: current, monkeypatch)
    for stream in (one, one, other, other, one):
        current = stream
        place.launch(lambda given: log.append(f"graph in {given.name}"))  # type: ignore[attr-defined]
    assert log == [
        *("graph in one", "graph in one"),
        *("other waits for one", "graph in other", "graph in other"),
        *("one waits for other", "graph in one"),
    ]


def test_a_graph_whose_launch_failed_may_run_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    one, other = Stream("one", log), Stream("other", log)
    current = one
    place = place_on(lambda: current, monkeypatch)

    def fail(_stream: object) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        place.launch(fail)
    current = other
    place.launch(lambda _stream: None)
    assert log == ["other waits for one"]


@pytest.mark.usefixtures("cuda_on_the_host")
def test_schedulers_of_two_threads_launch_and_capture_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a graph runs while it is launched. Captures and launches of both threads must not meet."""
    busy, met = threading.Lock(), []

    @contextmanager
    def alone() -> Iterator[None]:
        if not busy.acquire(blocking=False):
            met.append("two at once")
            busy.acquire()
        try:
            time.sleep(0.002)  # the other thread comes here
            yield
        finally:
            busy.release()

    replay = GraphLoop.launch

    def launch(self: GraphLoop, stream: int) -> None:
        with alone():
            replay(self, stream)

    monkeypatch.setattr(GraphLoop, "launch", launch)
    wanted = plain(5)
    answers: dict[int, list[dg.Output]] = {}
    begin = threading.Barrier(2)

    def serve(number: int) -> None:
        begin.wait()
        answers[number] = answers_of("graph")[0]

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == []
    assert answers == {0: wanted, 1: wanted}


def test_captures_of_two_threads_follow_each_other(captures: Captures) -> None:
    """They use one stream and one pool, and no collection may run in either."""
    begin = threading.Barrier(2)
    failures: list[BaseException] = []

    def step() -> None:
        time.sleep(0.002)

    def serve() -> None:
        begin.wait()
        try:
            for _ in range(5):
                capture("cuda:0", step)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert captures.log.count("new stream") == 2, "one place, whichever thread comes first"
    assert gc.isenabled()


class Finalized:
    """In a circle, so that a collection alone destroys it; tells which locks its thread holds then."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self.circle, self.tell = self, tell

    def __del__(self) -> None:
        self.tell()


def test_no_finalizer_runs_where_a_scheduler_may_wait_for_the_thread(captures: Captures) -> None:
    """It could wait for a scheduler of another thread, which waits for its turn."""
    place = cuda_graphs._capture_place(torch.device("cuda:0"))
    held: list[bool] = []
    Finalized(lambda: held.append(place.lock.locked()))
    capture("cuda:0", lambda: gc.isenabled() and held.append(True))
    assert held == [False], "a collection before the lock, and none until it is free"
    place.launch(lambda _stream: held.append(gc.isenabled()))
    assert held == [False, False]
    assert gc.isenabled()


def test_the_collector_rests_until_the_last_thread_is_done() -> None:
    rests = cuda_graphs._CollectorRests()
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with rests:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    inside.wait()
    with rests, rests:
        within = gc.isenabled()
    behind = gc.isenabled()  # the other thread is still inside
    leave.set()
    thread.join()
    assert [within, behind, gc.isenabled()] == [False, False, True]
    gc.disable()
    try:
        with rests:
            pass
        assert not gc.isenabled(), "as before"
    finally:
        gc.enable()


# Captures -------------------------------------------------------------------------------------------------------------


class Captures:
    """What a capture asks of torch.cuda, in its order; `fail` raises where a capture ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[Any] = []
        self.fail = False
        self.current = "the stream before"
        captures = self

        class Stream:
            def __init__(self) -> None:
                time.sleep(0.001)
                captures.log.append("new stream")

            def wait_stream(self, _other: object) -> None: ...

        class CUDAGraph:
            def __init__(self, keep_graph: bool = False) -> None:
                self.kept = keep_graph

            def instantiate(self) -> None:
                assert self.kept

        @contextmanager
        def graph(made: CUDAGraph, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            assert not gc.isenabled()
            assert captures.current != "the capture's stream", "a stream is captured once at a time"
            captures.log.append((pool, stream))
            captures.current = "the capture's stream"
            yield
            if captures.fail:
                raise RuntimeError("the capture was invalidated")
            captures.current = "the stream before"

        def set_stream(stream: object) -> None:
            captures.current = str(stream)

        class Before(str):
            def wait_stream(self, _other: object) -> None: ...

        for name, value in (
            ("Stream", Stream),
            ("CUDAGraph", CUDAGraph),
            ("graph", graph),
            ("graph_pool_handle", object),
            ("device", lambda _device: nullcontext()),
            ("stream", lambda _stream: nullcontext()),
            ("set_stream", set_stream),
            ("current_stream", lambda _device=None: Before(captures.current)),
        ):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(
            torch._C, "_cuda_endAllocateToPool", lambda *place: self.log.append("end of pool"), raising=False
        )
        monkeypatch.setattr(cuda_graphs, "_places", {})


def capture(device: str, step: Callable[[], None] = lambda: None) -> None:
    cuda_graphs._captured(cuda_graphs._capture_place(torch.device(device)), step)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    made = Captures(monkeypatch)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    return made


def test_all_captures_of_a_gpu_share_a_stream_and_a_pool_that_stay(captures: Captures) -> None:
    steps: list[int] = []
    for _ in range(3):
        capture("cuda:0", lambda: steps.append(1))
    assert len(steps) == 3 * 3, "two to warm up, one captured"
    assert captures.log.count("new stream") == 2, "one to warm up on and one to capture on, for the process"
    places = [entry for entry in captures.log if isinstance(entry, tuple)]
    assert len(places) == 4, "a first one keeps the pool alive when all graphs are gone"
    assert len(set(places)) == 1
    capture("cuda:1")
    others = [entry for entry in captures.log if isinstance(entry, tuple)][4:]
    assert not set(others) & set(places), "another GPU has its own"


def test_a_failed_capture_leaves_the_thread_and_the_allocator_as_they_were(captures: Captures) -> None:
    capture("cuda:0")
    captures.fail = True
    with pytest.raises(RuntimeError, match="invalidated"):
        capture("cuda:0")
    assert captures.current == "the stream before"
    assert captures.log[-1] == "end of pool"
    assert gc.isenabled()
    captures.fail = False
    capture("cuda:0")
