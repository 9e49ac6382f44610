"""Adapters by the name of the model: NAME:ADAPTER."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

import dgemma_ext as dg
from adapter_folders import SETTINGS, random_tensors
from command import CANVAS, random_checkpoint
from serving import MODEL, Running, running

NAMES = ("one", "two", "three", None)
LENGTH = 2 * CANVAS
MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
# A random model is not sure of anything, and would make all steps.
SAMPLER = dg.SamplerConfig(trim_canvas=True, max_denoising_steps=4)
FEW_STEPS: Any = {"diffusion": {"max_denoising_steps": 4}}
SHORT: Any = {"max_tokens": LENGTH, "extra_body": FEW_STEPS}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    model = dg.DiffusionGemma.from_pretrained(random_checkpoint(), device="cpu")
    for seed, name in enumerate(NAMES[:3]):
        tensors = random_tensors(model.config, seed, scale=0.3)
        model.load_adapter(name, dg.Adapter.from_tensors(SETTINGS, tensors, model.config))
    with running(model, max_batch=4) as found:
        yield found


def name_of(adapter: str | None) -> str:
    return MODEL if adapter is None else f"{MODEL}:{adapter}"


def test_seven_requests_with_three_adapters_and_none(server: Running) -> None:
    """At once, each gets the text that it gets alone."""
    client, asked = server.client(), [(seed, NAMES[seed % 4]) for seed in range(7)]

    def answer(seed: int, adapter: str | None) -> tuple[str, str | None]:
        found = client.chat.completions.create(model=name_of(adapter), messages=MESSAGES, seed=seed, **SHORT)
        return found.model, found.choices[0].message.content

    with ThreadPoolExecutor(7) as threads:
        found = list(threads.map(lambda one: answer(*one), asked))
    alone = [server.model.generate(MESSAGES, LENGTH, SAMPLER, seed, adapter=adapter).text for seed, adapter in asked]
    assert found == [(name_of(adapter), text) for (_, adapter), text in zip(asked, alone, strict=True)]
    assert len(set(alone[:4])) == 4, "the adapters change nothing"


def test_the_list_of_models_has_adapters(server: Running) -> None:
    models = server.client().models
    listed: dict[str, Any] = {model.id: model.model_dump() for model in models.list()}
    assert list(listed) == [MODEL, *(name_of(name) for name in NAMES[:3])]
    assert [model["parent"] for model in listed.values()] == [None, MODEL, MODEL, MODEL]
    assert models.retrieve(name_of("two")).id == name_of("two")


@pytest.mark.parametrize("name", [f"{MODEL}:four", "other:one", f"{MODEL}:", f"{MODEL}:base"])
def test_an_unknown_one_is_not_found(name: str, server: Running) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model=name, messages=MESSAGES)
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve(name)


def test_the_other_interfaces(server: Running) -> None:
    client, name = server.client(), name_of("one")
    wanted = server.model.generate(MESSAGES, LENGTH, SAMPLER, 3, adapter="one").text
    response = client.responses.create(
        model=name, input=MESSAGES, max_output_tokens=LENGTH, extra_body={"seed": 3, **FEW_STEPS}
    )
    assert response.output_text == wanted
    body = {"model": name, "messages": MESSAGES, "choices": ["a", "b"]}
    decided = client.post("/decisions", body=body, cast_to=dict[str, Any])["data"][0]["probabilities"]
    for adapter, is_same in (("one", True), (None, False)):
        own = server.model.decide(MESSAGES, ["a", "b"], adapter=adapter).probabilities
        assert (decided == own) is is_same


def test_a_default_adapter_is_what_the_model_s_own_name_means(server: Running) -> None:
    client, adapters = server.client(), server.model.network.adapters
    own, base = (server.model.generate(MESSAGES, LENGTH, SAMPLER, 1, adapter=name).text for name in ("one", None))
    adapters.default = "one"
    try:
        for name, text in ((MODEL, own), (f"{MODEL}:base", base)):
            found = client.chat.completions.create(model=name, messages=MESSAGES, seed=1, **SHORT)
            assert found.choices[0].message.content == text
    finally:
        adapters.default = None
