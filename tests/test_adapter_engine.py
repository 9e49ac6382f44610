"""Adapters by request: each one's tokens alone are its tokens in a batch, whatever adapters the others have."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dgemma_ext as dg
from adapter_folders import DECODER, SETTINGS, experts_tensors, random_tensors, write_adapter
from checkpoints import make_checkpoint
from dgemma_ext.checkpoint import inspect_checkpoint
from dgemma_ext.engine import adapter_bytes, memory_plan
from dgemma_ext.model import MatmulMode, Network
from models import random_model

SAMPLER = dg.SamplerConfig(max_denoising_steps=3, confidence_threshold=0.0)
# The default model of the tests has a window of 16 and canvases of 8.
LENGTH = 8
NAMES = ("one", "two", "experts", None)


@functools.cache
def adapters() -> dict[str, dg.Adapter]:
    config = random_model().config
    made = {
        "one": random_tensors(config, 1),
        "two": random_tensors(config, 2),
        "experts": experts_tensors(config),
        "zeros": {n: t * ("lora_A" in n) for n, t in (random_tensors(config, 3) | experts_tensors(config)).items()},
    }
    return {name: dg.Adapter.from_tensors(SETTINGS, tensors, config) for name, tensors in made.items()}


@contextmanager
def loaded(dtype: torch.dtype) -> Iterator[dg.DiffusionGemma]:
    model = random_model(dtype)
    for name, adapter in adapters().items():
        model.load_adapter(name, adapter)
    yield model
    for name in list(model.adapters):
        model.unload_adapter(name)


@pytest.fixture
def model() -> Iterator[dg.DiffusionGemma]:
    with loaded(torch.float32) as model:
        yield model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), layers=2, with_tokenizer=False)


def prompt(seed: int) -> list[int]:
    """Some are longer than the window."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 512, (5 + 9 * seed,), generator=generator).tolist()


def alone(model: dg.DiffusionGemma, seed: int, adapter: str | None, tokens: int = 2 * LENGTH) -> dg.Output:
    output: dg.Output = model.generate(prompt(seed), tokens, SAMPLER, seed, adapter=adapter)
    return output


SEVEN = [(seed, NAMES[seed % len(NAMES)]) for seed in range(7)]


@pytest.mark.parametrize(
    ("dtype", "batched"), [(torch.bfloat16, False), (torch.float32, True)], ids=["by turns", "in one pass"]
)
def test_seven_requests_with_three_adapters_and_none(dtype: torch.dtype, batched: bool) -> None:
    with loaded(dtype) as model:
        assert_alone_as_in_a_batch(model, batched)


def assert_alone_as_in_a_batch(model: dg.DiffusionGemma, batched: bool) -> None:
    # Canvases end at different steps, so that rows move.
    samplers = [replace(SAMPLER, max_denoising_steps=2 + seed % 3) for seed, _ in SEVEN]
    wanted = [
        model.generate(prompt(s), 2 * LENGTH, sampler, s, adapter=name)
        for (s, name), sampler in zip(SEVEN, samplers, strict=True)
    ]
    assert alone(model, 1, "one").token_ids != alone(model, 1, None).token_ids
    scheduler = dg.Scheduler(model, 4, 128, batched=batched)
    requests = [
        scheduler.submit(prompt(s), 2 * LENGTH, sampler, s, adapter=name)
        for (s, name), sampler in zip(SEVEN, samplers, strict=True)
    ]
    assert [request.adapter for request in requests] == [name for _, name in SEVEN]
    while not scheduler.idle:
        scheduler.step()
    assert [request.output for request in requests] == wanted
    seeds, names = zip(*SEVEN[::3], strict=True)
    outputs = model.generate([prompt(s) for s in seeds], 2 * LENGTH, samplers[0], seeds, adapter=names)
    assert outputs == [wanted[seed] for seed in seeds]


def test_zeros_give_the_bits_of_the_base(model: dg.DiffusionGemma) -> None:
    ids, canvas = torch.tensor([prompt(2)]), torch.tensor([prompt(1)[:LENGTH]])
    found = []
    for name in ("base", "zeros", "two"):
        cache = model.new_cache(1, 64)
        model.encode(ids, cache, adapter=name)
        logits = model.denoise(canvas, cache, adapter=name)
        logits = model.denoise(canvas, cache, self_conditioning=logits, adapter=name)
        found.append([logits, *cache.snapshot(0).keys])
    base, zeros, other = ([t.view(torch.int32) for t in one] for one in found)
    assert all(map(torch.equal, base, zeros))
    assert not any(map(torch.equal, base, other))


@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_a_prompt_in_pieces_gives_the_bits_of_the_whole(weights: str, folder: Path) -> None:
    """One row at a time, which torch multiplies in another way than many."""
    model = dg.DiffusionGemma.from_pretrained(folder, device="cpu", dtype="float32", weights=weights)
    model.load_adapter("one", dg.Adapter.from_tensors(SETTINGS, random_tensors(model.config, 1), model.config))
    model.load_adapter("experts", dg.Adapter.from_tensors(SETTINGS, experts_tensors(model.config), model.config))
    ids = torch.tensor([prompt(6)[:30]])
    for name in ("one", "experts"):
        whole, pieces = model.new_cache(1, 30), model.new_cache(1, 30)
        model.encode(ids, whole, adapter=name)
        model.encode(ids, pieces, chunk=1, adapter=name)
        one, other = whole.snapshot(0), pieces.snapshot(0)
        assert all(map(torch.equal, (*one.keys, *one.values), (*other.keys, *other.values)))


def test_the_prefix_cache_keeps_adapters_apart(model: dg.DiffusionGemma) -> None:
    """The same ids under another adapter are another prefix; the same adapter under another name is the same."""
    wanted = {name: alone(model, 6, name).token_ids for name in ("one", "two", None)}
    model.load_adapter("again", adapters()["one"])
    scheduler = dg.Scheduler(model, 2, 128, prefix_cache_bytes=1 << 24)
    found = []
    for name in ("one", "two", None, "one", None, "again"):
        request = scheduler.submit(prompt(6), 2 * LENGTH, SAMPLER, 6, adapter=name)
        while not request.done:
            scheduler.step()
        assert list(request.output.token_ids) == list(wanted["one" if name == "again" else name])
        found.append(request.cached_tokens)
    assert found == [0, 0, 0, len(prompt(6)), len(prompt(6)), len(prompt(6))]
    # Together: the one is encoded first for the other, which begins with it, only where they have one adapter.
    both = [scheduler.submit([7, *prompt(6)], LENGTH, SAMPLER, 6, adapter=name) for name in ("one", "two", "one")]
    while not scheduler.idle:
        scheduler.step()
    assert [request.cached_tokens for request in both] == [0, 0, len(prompt(6)) + 1]


def test_a_chat_has_one_adapter(model: dg.DiffusionGemma) -> None:
    answers = []
    for name in ("one", None):
        chat = model.chat(adapter=name)
        answers.append([chat.send("hello", LENGTH, SAMPLER), chat.send("and more", LENGTH, SAMPLER)])
        again = model.generate(chat.messages[:3], LENGTH, SAMPLER, adapter=name)
        assert again.text == answers[-1][1]
    assert answers[0] != answers[1]


def test_decisions(model: dg.DiffusionGemma) -> None:
    asked = dict(prompt=["which?"] * 3, choices=["a", "b"], seed=[4, 4, 4])
    one, base, two = model.decide(**asked, adapter=["one", None, "two"])
    assert one.probabilities == model.decide("which?", ["a", "b"], seed=4, adapter="one").probabilities
    assert len({tuple(each.probabilities.values()) for each in (one, base, two)}) == 3


def test_a_default_adapter_and_the_base(model: dg.DiffusionGemma) -> None:
    own, base = alone(model, 1, "one").token_ids, alone(model, 1, None).token_ids
    model.network.adapters.default = "one"
    assert alone(model, 1, None).token_ids == own
    assert alone(model, 1, "base").token_ids == base
    model.unload_adapter("one")
    assert alone(model, 1, None).token_ids == base


def test_names(model: dg.DiffusionGemma) -> None:
    for call in (model.generate, model.chat, dg.Scheduler(model, 1, 64).submit):
        arguments: dict[str, Any] = {} if call == model.chat else {"prompt": [5, 6]}
        with pytest.raises(
            ValueError, match=r"adapter must be the name of a loaded adapter \(one, two, experts, zeros, ba"
        ):
            call(**arguments, adapter="three")
    with pytest.raises(ValueError, match="adapter must be one value or 2, one per prompt, got 3"):
        model.generate([[5], [6]], adapter=["one", None, "two"])
    for name, message in (("one", "'one' is loaded already"), ("base", "name must be a name of its own"), ("", "name")):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(name, adapters()["one"])
    with pytest.raises(ValueError, match="name must be one of one, two, experts"):
        model.unload_adapter("three")
    with pytest.raises(ValueError, match="passes is given"):
        model.load_adapter("three", adapters()["one"], "both")


def test_what_is_loaded_tells_of_itself(model: dg.DiffusionGemma) -> None:
    one, config = model.adapters["one"], model.config
    assert (one.name, one.rank, one.scale, one.passes) == ("one", 4, 2.0, "separate")
    assert "q_proj" in one.modules
    assert one.nbytes == adapters()["one"].parameters * 4
    assert one.nbytes == adapter_bytes(adapters()["one"], torch.float32, torch.device("cpu"))
    on_gpu = adapter_bytes(adapters()["one"], torch.float32, torch.device("cuda"))
    assert on_gpu == one.nbytes + sum(factors.numel for factors in adapters()["one"].decoder.values()) * 4
    assert model.adapters["zeros"].nbytes == 0, "what changes nothing is not kept"
    shared = {
        n.replace(".decoder.", ".encoder.language_model."): t for n, t in random_tensors(config, 4, [DECODER]).items()
    }
    model.load_adapter(
        "shared", dg.Adapter.from_tensors(SETTINGS, shared | random_tensors(config, 4, [DECODER]), config)
    )
    assert model.adapters["shared"].nbytes == one.nbytes // 2
    assert repr(one) == repr(copy.deepcopy(one))
    with pytest.raises(TypeError):
        model.adapters["four"] = one  # type: ignore[index]


def test_copies_of_a_model_and_of_a_request_have_their_adapters(model: dg.DiffusionGemma) -> None:
    twin = copy.deepcopy(model)
    model_output = alone(model, 1, "one")
    model.unload_adapter("one")
    assert alone(twin, 1, "one") == model_output
    request = dg.Scheduler(twin, 1, 64).submit([5, 6], LENGTH, adapter="two")
    assert pickle.loads(pickle.dumps(request)).adapter == "two"


def test_an_adapter_is_kept_until_its_requests_end(model: dg.DiffusionGemma) -> None:
    wanted = alone(model, 1, "one")
    scheduler = dg.Scheduler(model, 1, 64)
    request = scheduler.submit(prompt(1), 2 * LENGTH, SAMPLER, 1, adapter="one")
    scheduler.step()
    model.unload_adapter("one")
    while not scheduler.idle:
        scheduler.step()
    assert request.output == wanted


def test_from_pretrained(folder: Path, tmp_path: Path) -> None:
    config = dg.ModelConfig.from_file(folder)
    one = write_adapter(tmp_path / "one", random_tensors(config, 1))
    two = write_adapter(tmp_path / "two", random_tensors(config, 2, [DECODER]))
    with pytest.raises(ValueError, match="passes must be both or stored"):
        dg.DiffusionGemma.from_pretrained(folder, adapters={"two": two})
    with pytest.raises(ValueError, match="adapters has the name 'base'"):
        dg.DiffusionGemma.from_pretrained(folder, adapters={"base": one})
    model = dg.DiffusionGemma.from_pretrained(folder, adapter=one, adapters={"one": one, "two": two}, passes="stored")
    assert {name: adapter.passes for name, adapter in model.adapters.items()} == {
        "default": "separate",
        "one": "separate",
        "two": "decoder only",
    }
    found = {
        name: model.generate([5, 6, 7], LENGTH, SAMPLER, adapter=name).token_ids
        for name in (None, "one", "base", "two")
    }
    assert found[None] == found["one"]
    assert len(set(found.values())) == 3


def test_the_memory_plan_counts_adapters(folder: Path) -> None:
    config = dg.ModelConfig.from_file(folder)
    adapter = dg.Adapter.from_tensors(SETTINGS, random_tensors(config, 1), config)
    info = inspect_checkpoint(folder, config)
    plans = [
        memory_plan(config, info, "auto", torch.bfloat16, torch.device("cpu"), adapters=a) for a in ((), [adapter])
    ]
    assert plans[1].total - plans[0].total == adapter.parameters * 2
    assert "adapters" in plans[1].table()
    assert "adapters" not in plans[0].table()


# What a GPU's passes have: one product for the rows of all canvases, factors by an index on the device. ---------------


@pytest.mark.parametrize("mode", [MatmulMode.BATCHED, MatmulMode.INVARIANT])
def test_one_product_for_all_canvases(mode: MatmulMode, model: dg.DiffusionGemma) -> None:
    """Ranks differ, and rows change their adapters while requests come and go. In this mode products have all rows, so
    values differ by rounding alone."""
    config, weights = model.config, model.weights
    network = Network(config, weights, mode)
    shared = dg.DiffusionGemma(network, model.defaults, model.tokenizer)
    long = dg.Adapter.from_tensors(SETTINGS | {"r": 11, "lora_alpha": 11}, random_tensors(config, 5, rank=11), config)
    names = ["one", "two", "long", None, "one", "long", "two"]
    for name, adapter in (*adapters().items(), ("long", long)):
        if name in names:
            shared.load_adapter(name, adapter)
    model.load_adapter("long", long)
    scheduler = dg.Scheduler(shared, 4, 128, batched=True)
    requests = [scheduler.submit(prompt(s), 2 * LENGTH, SAMPLER, s, adapter=n) for s, n in enumerate(names)]
    while not scheduler.idle:
        scheduler.step()
    assert [r.output.token_ids for r in requests] == [alone(model, s, n).token_ids for s, n in enumerate(names)]
