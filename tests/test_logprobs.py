"""Log-probabilities of an answer: against float64 from the canvas of the last step, in batches and loops, with ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dgemma_ext as dg
from dgemma_ext import SamplerConfig
from dgemma_ext.engine.loop import LOOPS
from dgemma_ext.model import Canvases
from dgemma_ext.sampling import logprobs as module
from dgemma_ext.sampling.logprobs import canvas_logprobs
from models import random_model

LENGTH = 8  # of the test model's canvas
SAMPLER = SamplerConfig(max_denoising_steps=4, confidence_threshold=4.0, entropy_bound=6.0, eos_token_ids=())


def check(answer: Any, capped: torch.Tensor, top: int) -> None:
    """capped: soft-capped logits [tokens, vocabulary] in float64 that the answer's tokens came from."""
    wanted = capped.log_softmax(-1)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids)
    for token, given, row in zip(answer.token_ids, answer.logprobs, wanted, strict=True):
        assert given.logprob == pytest.approx(float(row[token]), abs=2e-5)
        assert len(given.top_ids) == len(given.top_logprobs) == top
        # Stable, so that ties go to the lowest id.
        order = row.sort(descending=True, stable=True)
        assert given.top_ids == tuple(order.indices[:top].tolist())
        assert given.top_logprobs == pytest.approx(order.values[:top].tolist(), abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_those_of_one_step_are_those_of_denoise(dtype: torch.dtype) -> None:
    model, prompt, canvas = random_model(dtype), [5, 6, 7], list(range(40, 40 + LENGTH))
    one_step = SamplerConfig(max_denoising_steps=1, eos_token_ids=())
    answer = model.generate(prompt, LENGTH, one_step, canvas=dg.Canvas(tokens=canvas), logprobs=5)
    cache = model.new_cache(1, 20)
    model.encode([prompt], cache)
    check(answer, model.denoise(torch.tensor([canvas]), cache)[0].double(), top=5)
    assert [one.top_ids[0] for one in answer.logprobs] == list(answer.token_ids), "the draft is the argmax"
    assert model.generate(prompt, LENGTH, one_step, canvas=dg.Canvas(tokens=canvas)).logprobs is None


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("driver", [None, *LOOPS])
def test_each_request_gets_what_it_asked_for(
    driver: str | None, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the last step of every canvas, also where rows move up, or have been finished while others go on.

    driver None steps one by one.
    """
    model, asked = random_model(), [None, 0, 3, 20, 1]
    scheduler = dg.Scheduler(model, max_batch=5, max_length=60, batched=batched, driver=driver or "eager")
    requests = [
        scheduler.submit([seed + 3] * (seed + 1), 12 + seed, SAMPLER, seed, logprobs=top)
        for seed, top in enumerate(asked)
    ]
    original = model.network.forward
    newest: dict[int, torch.Tensor] = {}  # slot → the output of the last step that the slot was active in

    def recording(cache: dg.Cache, canvases: Canvases, *rest: Any) -> torch.Tensor | None:
        hidden = original(cache, canvases, *rest)
        assert hidden is not None
        for row, slot in enumerate(canvases.slot.tolist()):
            if slot >= 0:
                newest[slot] = hidden[row].clone()
        return hidden

    monkeypatch.setattr(model.network, "forward", recording)
    committed: dict[int, list[torch.Tensor]] = {}
    while not scheduler.idle:
        slots = {request.number: request._slot for request in requests}
        events = scheduler.step() if driver is None else scheduler.finish_canvas()
        for event in events:
            if isinstance(event, dg.Commit):
                slot = slots[event.request.number]
                slot = event.request.number if slot < 0 else slot
                raw = newest[slot] @ model.weights.embed_tokens.T
                cap = model.config.final_logit_softcapping
                capped = cap * torch.tanh(raw.double() / cap)
                committed.setdefault(event.request.number, []).append(capped[: len(event.token_ids)])
                if event.request.alternatives is None:
                    assert event.logprobs is None
                else:
                    check(event, committed[event.request.number][-1], event.request.alternatives)
    for request, top in zip(requests, asked, strict=True):
        if top is None:
            assert request.output.logprobs is None
        else:
            check(request.output, torch.cat(committed[request.number]), top)


def test_pinned_tokens_were_not_chosen() -> None:
    model = random_model()
    content = dg.Canvas(tokens=[9] * LENGTH, pinned=[True] * 3 + [False] * (LENGTH - 3))
    answer = model.generate([1, 2], LENGTH, SAMPLER, canvas=content, logprobs=2)
    assert answer.logprobs is not None
    assert answer.logprobs[:3] == (dg.TokenLogprobs(0.0),) * 3
    assert all(len(one.top_ids) == 2 and one.logprob < 0 for one in answer.logprobs[3:])


def test_ties_and_signs_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 12)  # two rows at once
    logits = torch.tensor(
        [[0.0, -0.0, 1.0, 1.0, -3.0], [-1.0, -2.0, -2.0, -0.5, -2.0], [7.0, 7.0, 7.0, 7.0, 7.0]], dtype=torch.bfloat16
    )
    found = canvas_logprobs(logits, 0.0, torch.tensor([2, 1, 4]), torch.zeros(3, dtype=torch.bool), 4)
    assert [one.top_ids for one in found] == [(2, 3, 0, 1), (3, 0, 1, 2), (0, 1, 2, 3)]
    wanted = logits.double().log_softmax(-1)
    assert [one.logprob for one in found] == pytest.approx([float(wanted[0, 2]), float(wanted[1, 1]), -1.6094379])


@pytest.mark.parametrize("value", [-1, 21, True, "5", 1.5])
def test_bad_numbers_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"logprobs must be an integer in \[0, 21\)"):
        dg.Scheduler(random_model(), 1, 30).submit([1], 4, logprobs=value)
