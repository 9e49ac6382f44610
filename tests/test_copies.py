"""What the package hands out can be copied by copy.deepcopy and by pickle, in other processes too."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dgemma_ext as dg
from models import random_model, smallest_model

SAMPLER = dg.SamplerConfig(max_denoising_steps=2, eos_token_ids=[9])
CANVAS = dg.Canvas([5, None], [True, False], allowed=[[5], None])


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


copied = pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled], ids=["copy", "deepcopy", "pickle"])


@copied
def test_events_and_requests(copied: Callable[[Any], Any]) -> None:
    model = random_model()
    events = list(model.stream("Hello.", max_new_tokens=12, sampler=SAMPLER, canvas=CANVAS))
    assert len({type(event) for event in events}) == 2
    for event, twin in zip(events, copied(events), strict=True):
        assert type(twin) is type(event)
        assert (twin.text, twin.token_ids, twin.canvas_index) == (event.text, event.token_ids, event.canvas_index)
        if isinstance(event, dg.Draft):
            assert torch.equal(twin.entropy, event.entropy)
            assert torch.equal(twin.accepted, event.accepted)
        request, given = twin.request, event.request
        assert (request.state, request.number, request.seed) == (given.state, given.number, given.seed)
        assert (request.sampler, request.canvas) == (given.sampler, given.canvas)
        assert request.output == given.output
        assert request.done
        assert not request.cancel()


def test_a_copied_request_belongs_to_no_scheduler() -> None:
    scheduler = dg.Scheduler(smallest_model(), max_batch=1, max_length=32)
    request = scheduler.submit([1, 2, 3], 8, SAMPLER, deadline=100)
    scheduler.step()
    twin = pickled(request)
    assert twin.state is dg.RequestState.RUNNING
    assert twin.cancel()
    assert twin.state is dg.RequestState.CANCELLED
    assert request.state is dg.RequestState.RUNNING
    assert scheduler.free_slots == 0


@copied
def test_settings_answers_configurations_and_snapshots(copied: Callable[[Any], Any]) -> None:
    model = random_model()
    output = model.generate([1, 2], max_new_tokens=8, sampler=SAMPLER)
    for value in (SAMPLER, CANVAS, output, model.config, model.defaults, SAMPLER.resolve(model.defaults, 8)):
        assert copied(value) == value
    cache = model.new_cache(2, 32)
    model.encode([[3, 4, 5]], cache)  # type: ignore[arg-type]
    cache.restore(1, copied(cache.snapshot(0)))
    twin = copied(cache)
    canvas: Any = [[5] * 8]
    assert torch.equal(model.denoise(canvas, twin, slots=[1]), model.denoise(canvas, cache, slots=[0]))


@copied
def test_tokenizers_with_their_templates(copied: Callable[[Any], Any]) -> None:
    tokenizer = random_model().tokenizer
    assert tokenizer is not None
    twin = copied(tokenizer)
    assert twin.encode_prompt("Hello.") == tokenizer.encode_prompt("Hello.")
    assert twin.decode([70, 71, 72]) == tokenizer.decode([70, 71, 72])


@copied
@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_models(copied: Callable[[Any], Any], weights: str) -> None:
    model = dg.DiffusionGemma.from_pretrained("6x6", device="cpu", weights=weights)
    model.kept_scheduler = dg.Scheduler(model, max_batch=1, max_length=64)
    wanted = model.generate("hello", sampler=SAMPLER)
    twin = copied(model)
    assert twin.kept_scheduler is None
    assert model.kept_scheduler is not None
    assert twin.generate("hello", sampler=SAMPLER) == wanted
    if copied is not copy.copy:
        # Its weights are its own.
        assert twin.weights.norm.data_ptr() != model.weights.norm.data_ptr()
        twin.weights.norm.fill_(0.5)
        assert model.generate("hello", sampler=SAMPLER) == wanted


def test_a_pickled_model_is_as_large_as_its_weights() -> None:
    """A tensor is a part of a mapped file, which is not in the pickle as a whole for each."""
    model = dg.DiffusionGemma.from_pretrained("6x6", device="cpu")
    stored = (Path(dg.__file__).parent / "demo" / "model.safetensors").stat().st_size
    assert len(pickle.dumps(model)) < 1.1 * stored


@copied
def test_errors(copied: Callable[[Any], Any]) -> None:
    for error in (
        dg.CheckpointError("is bad", file="a/b", tensor="x"),
        dg.NonFiniteError("not finite", request=3, step=7),
        not_enough_memory(),
    ):
        twin = copied(error)
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert {name: str(value) for name, value in vars(twin).items()} == {
            name: str(value) for name, value in vars(error).items()
        }


def not_enough_memory() -> dg.NotEnoughMemory:
    from dgemma_ext.engine import memory

    model = smallest_model()
    plan = memory.batch_plan(model.network, 1, 4, 16, 1)
    with pytest.raises(dg.NotEnoughMemory) as raised:
        memory.check_memory(plan, -(2**60), torch.device("cpu"))
    return raised.value


def test_what_cannot_be_copied_says_so() -> None:
    for value in (dg.Scheduler(smallest_model(), max_length=32), random_model().chat(max_length=64)):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"cannot be copied or pickled"):
                copied(value)


def test_another_process_reads_what_this_one_wrote(tmp_path: Path) -> None:
    model = dg.DiffusionGemma.from_pretrained("6x6", device="cpu")
    events = list(model.stream("hello", sampler=SAMPLER))
    (tmp_path / "all").write_bytes(pickle.dumps((model, events, events[-1].request.output)))
    program = """if True:
        import pickle, sys
        import dgemma_ext as dg
        model, events, output = pickle.load(open(sys.argv[1], "rb"))
        assert events[-1].request.output == output
        sampler = dg.SamplerConfig(max_denoising_steps=2, eos_token_ids=[9])
        again = model.generate("hello", sampler=sampler)
        assert again == output, (again, output)
    """
    subprocess.run([sys.executable, "-c", program, tmp_path / "all"], check=True)
