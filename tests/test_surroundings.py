"""What a program around the package sets: torch's modes and defaults, threads, forks, environment variables."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dgemma_ext as dg
from checkpoints import make_checkpoint
from command import dgemma
from dgemma_ext import torch_state

SAMPLER = dg.SamplerConfig(max_denoising_steps=3, confidence_threshold=0.0, trim_canvas=True)
END = 77


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def load(folder: Path, **options: Any) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(folder, device="cpu", **options)


def everything(model: dg.DiffusionGemma) -> list[Any]:
    """What generating, a chat and the two passes give."""
    prompts, canvas = [[5, 6, 7], "Hello."], dg.Canvas([5, None, 9], [True, False, False], allowed=[*[None] * 3, [END]])
    outputs = model.generate(prompts, max_new_tokens=13, sampler=SAMPLER, seed=[1, 2], canvas=canvas)
    drafts = list(model.stream([5, 6, 7], max_new_tokens=9, sampler=SAMPLER))
    chat = model.chat(max_length=200)
    said = [chat.send(text, max_new_tokens=8, sampler=SAMPLER) for text in ("one", "two")]
    cache = model.new_cache(2, 64)
    model.encode([[3, 4, 5]], cache, slots=[1])  # type: ignore[arg-type]
    cache.restore(0, cache.snapshot(1))
    logits = model.denoise([[5] * 8], cache, slots=[0])  # type: ignore[arg-type]
    again = model.denoise([[5] * 8], cache, slots=[1], self_conditioning=logits / 0.8)  # type: ignore[arg-type]
    entropies = [event.entropy.tolist() for event in drafts if isinstance(event, dg.Draft)]
    return [outputs, entropies, said, logits.tolist(), again.tolist()]


# torch ----------------------------------------------------------------------------------------------------------------


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def setting(
    get: Callable[[], Any], put: Callable[[Any], Any], value: Any
) -> Callable[[], AbstractContextManager[None]]:
    """A block in which something of torch's has another value."""

    @contextmanager
    def inside() -> Iterator[None]:
        before = get()
        put(value)
        try:
            yield
        finally:
            put(before)

    return inside


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default device meta": lambda: torch.device("meta"),
    "default dtype float64": setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default dtype bfloat16": setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "a dispatch mode": Dispatching,
    "a function mode": Overriding,
    "deterministic algorithms": setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "one thread": setting(torch.get_num_threads, torch.set_num_threads, 1),
    "three threads": setting(torch.get_num_threads, torch.set_num_threads, 3),
}
OPTIONS: list[dict[str, Any]] = [{}, {"dtype": "float32"}]
QUANTIZED: list[dict[str, Any]] = [{"weights": "int4"}, {"weights": "fp8", "activations": "fp8"}]
# Weights that are quantized while loading are made by other code, whose tensors have a device and a dtype.
CASES = [
    (state, options)
    for state in STATES
    for options in (OPTIONS + QUANTIZED if state.startswith(("default", "inference")) else OPTIONS)
]


@pytest.mark.parametrize(("state", "options"), CASES, ids=str)
def test_the_state_of_torch_changes_no_bit(state: str, options: dict[str, Any], folder: Path) -> None:
    """The model is loaded inside the state, and used inside and outside of it."""
    wanted = wanted_of(folder, tuple(options.items()))
    with STATES[state]():
        model = load(folder, **options)
        assert everything(model) == wanted
    assert everything(model) == wanted


@cache
def wanted_of(folder: Path, options: tuple[tuple[str, Any], ...]) -> list[Any]:
    return everything(load(folder, **dict(options)))


def test_a_scheduler_made_in_inference_mode_goes_on_outside(folder: Path) -> None:
    model = load(folder)
    with torch.inference_mode():
        scheduler = dg.Scheduler(model, max_batch=2, max_length=64)
        requests = [scheduler.submit([5, 6, index], 13, SAMPLER) for index in range(3)]
        scheduler.step()
    while not scheduler.idle:
        scheduler.step()
    assert [request.output for request in requests] == model.generate([[5, 6, i] for i in range(3)], 13, SAMPLER)


def test_threads_may_change_between_two_steps(folder: Path) -> None:
    model = load(folder)
    wanted = model.generate([5, 6, 7], 24, SAMPLER)
    scheduler = dg.Scheduler(model, max_batch=1, max_length=64)
    request = scheduler.submit([5, 6, 7], 24, SAMPLER)
    for count in (1, 3, 2, 4) * 3:
        with setting(torch.get_num_threads, torch.set_num_threads, count)():
            scheduler.step()
    assert request.output == wanted


def test_what_comes_out_has_no_gradient(folder: Path) -> None:
    model = load(folder)
    cache = model.new_cache(1, 64)
    logits = model.denoise(torch.full((1, 8), 5), cache)
    again = model.denoise(torch.full((1, 8), 5), cache, self_conditioning=logits.clone().requires_grad_())
    assert not again.requires_grad
    assert torch.is_grad_enabled()


def test_tensors_without_values_are_an_error_at_once(folder: Path) -> None:
    model = load(folder)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="a FakeTensorMode is active"):
        model.generate([5, 6, 7], 8, SAMPLER)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="a FakeTensorMode is active"):
        load(folder)


# Forks ----------------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], object]) -> str:
    """What a forked process finds: the result as text, or the error; "no answer" where it hangs."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            found = str(work())
        except RuntimeError as error:
            found = f"RuntimeError: {error}"
        os.write(writing, found.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as result:
        found = result.read()
    os.waitpid(child, 0)
    return found or "no answer"


def test_a_fork_after_a_computation_is_an_error_at_once_and_not_a_hang(folder: Path) -> None:
    model = load(folder)
    wanted = model.generate([5, 6, 7], 8, SAMPLER)

    def answers() -> bool:
        return model.generate([5, 6, 7], 8, SAMPLER) == wanted

    def on_one_thread() -> bool:
        torch.set_num_threads(1)
        return answers()

    def in_a_thread_of_its_own() -> list[bool]:
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(answers()))
        thread.start()
        thread.join()
        return found

    assert forked(answers).startswith("RuntimeError: this process was forked by a thread that had computed")
    assert forked(lambda: load(folder)).startswith("RuntimeError: this process was forked")
    assert forked(on_one_thread) == "True"
    assert forked(in_a_thread_of_its_own) == "[True]"
    assert answers()


def test_a_fork_before_any_computation_is_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = threading.local()
    monkeypatch.setattr(torch_state, "_thread", fresh)

    def enters() -> str:
        with torch_state.own_torch_state():
            return "entered"

    assert forked(enters) == "entered"
    enters()
    assert forked(enters).startswith("RuntimeError: this process was forked")


# Threads --------------------------------------------------------------------------------------------------------------


def together(*works: Callable[[], object]) -> list[object]:
    """What functions in threads of their own return or raise."""
    found: list[object] = [None] * len(works)

    def run(index: int) -> None:
        try:
            found[index] = works[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_threads_share_a_scheduler(folder: Path) -> None:
    model = load(folder)
    prompts = [[5, 6, index] for index in range(4)]
    wanted = model.generate(prompts, 13, SAMPLER)
    scheduler = dg.Scheduler(model, max_batch=2, max_length=64)

    def work() -> list[dg.Output]:
        outputs = []
        for _ in range(3):
            for prompt in prompts:
                scheduler.submit(prompt, 13, SAMPLER).cancel()
                request = scheduler.submit(prompt, 13, SAMPLER)
                while not request.done:
                    scheduler.step()
                outputs.append(request.output)
        return outputs

    assert together(work, work, work) == [wanted * 3] * 3
    assert scheduler.idle
    assert scheduler.free_slots == 2


@pytest.mark.parametrize("keeps", [False, True], ids=["as on a CPU", "with a kept scheduler, as on a GPU"])
def test_threads_may_generate_at_once(keeps: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma_ext.engine.generation._keeps_schedulers", lambda model: keeps)
    model = load(folder)
    prompts = [[5, 6, index] for index in range(6)]

    def work() -> list[Any]:
        streams = [list(model.stream(prompt, 13, SAMPLER)) for prompt in prompts]
        drafts = [[event.token_ids for event in events] for events in streams]
        return [drafts, [model.generate(prompt, 13, SAMPLER) for prompt in prompts]]

    wanted = work()
    assert together(work, work, work) == [wanted] * 3


def test_a_chat_is_one_thread_s_at_a_time(folder: Path) -> None:
    chat = load(folder).chat(max_length=200)
    turn = chat.stream("one", max_new_tokens=8, sampler=SAMPLER)
    next(turn)
    (found,) = together(lambda: chat.send("two", max_new_tokens=8, sampler=SAMPLER))
    assert isinstance(found, RuntimeError)
    assert str(found) == "a turn of this chat is under way in another thread"
    list(turn)
    (found,) = together(lambda: chat.send("two", max_new_tokens=8, sampler=SAMPLER))
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert found == chat.messages[-1]["content"]


def test_a_function_for_drafts_that_raises_leaves_the_kept_scheduler_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgemma_ext.engine.generation._keeps_schedulers", lambda model: True)
    model = load(folder)

    def fail(draft: dg.Draft) -> None:
        raise OSError("no room for drafts")

    with pytest.raises(OSError, match="no room for drafts") as raised:
        model.generate([5, 6, 7], 13, SAMPLER, on_draft=fail)
    kept = model.kept_scheduler
    assert kept is not None
    assert kept.claim(model), "even while the exception is there"
    kept.release()
    assert raised.value is not None


# The model's own settings ---------------------------------------------------------------------------------------------


def test_defaults_that_change_are_those_of_the_next_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma_ext.engine.generation._keeps_schedulers", lambda model: True)
    model = load(folder)
    model.generate([5, 6, 7], 8, SAMPLER)
    kept = model.kept_scheduler
    model.defaults = replace(model.defaults, max_new_tokens=3, eos_token_ids=())
    assert len(model.generate([5, 6, 7], sampler=SAMPLER).token_ids) == 3
    assert model.kept_scheduler is kept


# Environment variables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DGEMMA_DEBUG", "yes", "environment variable DGEMMA_DEBUG must be 0 or 1, got 'yes'"),
        ("DGEMMA_SYNC", "on", "environment variable DGEMMA_SYNC must be 0 or 1, got 'on'"),
        ("DGEMMA_PDL", "2", "environment variable DGEMMA_PDL must be 0 or 1, got '2'"),
        ("DGEMMA_KERNELS", "Plain", "environment variable DGEMMA_KERNELS must be plain, got 'Plain'"),
        ("DGEMMA_CPU", "abacus", "environment variable DGEMMA_CPU: got 'abacus', wants one of"),
    ],
)
def test_a_variable_of_ours_with_an_unknown_value_is_an_error(
    name: str, value: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        load(folder)
    run = dgemma("info")
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith(f"dgemma: {message}")
    assert run.err.count("\n") == 1
    for good in ("", "plain" if name == "DGEMMA_KERNELS" else "scalar" if name == "DGEMMA_CPU" else "0"):
        monkeypatch.setenv(name, good)
        load(folder)
