"""What arguments may be: every public argument takes what is an integer, a number, a flag or a sequence in Python's,
numpy's or torch's sense as if it were Python's own, and refuses everything else by its name.
"""

from __future__ import annotations

import fractions
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import dgemma_ext as dg
from argument_values import (
    NO_IDS,
    NO_INTEGERS,
    NO_NUMBERS,
    NO_SEQUENCES,
    NUMBERS,
    SAMPLER,
    THREES,
    Odd,
    answer,
    refused,
    same_as_sequence,
    sampled,
)
from dgemma_ext import arguments, demo
from dgemma_ext.profile import profile
from models import random_model, smallest_model


def scheduled(**changes: Any) -> Any:
    """What a scheduler answers, and its sizes."""
    scheduler = dg.Scheduler(smallest_model(), **({"max_length": 24} | changes))
    request = scheduler.submit([3, 4, 5], 3, SAMPLER)
    while not scheduler.idle:
        scheduler.step()
    return request.output, scheduler.max_batch, scheduler.cache.max_length


def logits(**changes: Any) -> list[float]:
    """The logits of a canvas after three tokens, through encode and denoise."""
    given = {"ids": [[3, 4, 5]], "slots": [0], "canvas": [[3, 4, 5]], "chunk": 3, "lengths": [3]} | changes
    model = smallest_model()
    cache = model.new_cache(1, 24)
    model.encode(given["ids"], cache, given["slots"], given["lengths"], chunk=given["chunk"])
    found: list[float] = model.denoise(given["canvas"], cache, given["slots"]).flatten().tolist()
    return found


def cache_of(slot: Any = 0, **changes: Any) -> Any:
    cache = smallest_model().new_cache(**({"slots": 4, "max_length": 24} | changes))
    cache.restore(slot, cache.snapshot(slot))
    cache.free(slot)
    return cache.slots, cache.max_length, cache.length(slot)


def profiled(**changes: Any) -> Any:
    return profile(smallest_model(), **({"steps": 1, "prefix": 3} | changes)).drafts


# Every public argument that takes an integer: its name in messages, what it changes.
INTEGERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "generate.seed": ("seed", lambda value: answer(seed=value)),
    "generate.max_new_tokens": ("max_new_tokens", lambda value: answer(max_new_tokens=value)),
    "SamplerConfig.max_denoising_steps": ("max_denoising_steps", lambda value: sampled(max_denoising_steps=value)),
    "SamplerConfig.stability_threshold": ("stability_threshold", lambda value: sampled(stability_threshold=value)),
    "SamplerConfig.canvas_length": ("canvas_length", lambda value: sampled(canvas_length=value)),
    "Canvas.start_step": ("canvas.start_step", lambda value: dg.Canvas([3], start_step=value)),
    "Scheduler.max_batch": ("max_batch", lambda value: scheduled(max_batch=value)),
    "Scheduler.max_length": ("max_length", lambda value: scheduled(max_length=value)),
    "encode.chunk": ("chunk", lambda value: logits(chunk=value)),
    "new_cache.slots": ("slots", lambda value: cache_of(slots=value)),
    "new_cache.max_length": ("max_length", lambda value: cache_of(max_length=value)),
    "Cache slot": ("slot", lambda value: cache_of(slot=value)),
    "demo.draw.seed": ("seed", lambda value: demo.draw(6, value)),
    "demo.draw.index": ("index", lambda value: demo.draw(6, 1, value)),
    "chat.max_length": ("max_length", lambda value: random_model().chat(max_length=value)._scheduler.cache.max_length),
    "profile.steps": ("steps", lambda value: profiled(steps=value)),
    "profile.prefix": ("prefix", lambda value: profiled(prefix=value)),
    "profile.context": ("context", lambda value: profiled(context=value)),
    "profile.seed": ("seed", lambda value: profiled(seed=value)),
}
# Those whose default is None, except generate's max_new_tokens, whose default is too long for this model.
DEFAULTED = [
    "SamplerConfig.max_denoising_steps",
    "SamplerConfig.stability_threshold",
    "SamplerConfig.canvas_length",
    "Scheduler.max_length",
    "chat.max_length",
    "profile.context",
]


@pytest.mark.parametrize("argument", INTEGERS)
def test_an_integer_of_any_kind_is_that_integer_and_all_else_is_refused(argument: str) -> None:
    name, call = INTEGERS[argument]
    wanted = call(3)
    for three in THREES[1:] if "profile" not in argument else [np.int64(3)]:
        assert call(three) == wanted, three
    for value in NO_INTEGERS:
        # A seed may be a sequence with one entry for each prompt.
        if argument == "generate.seed" and arguments.is_sequence(value) and not isinstance(value, Odd):
            assert call(value) == wanted
        else:
            assert refused(name, lambda value=value: call(value)), repr(type(value))  # type: ignore[misc]
    assert refused(name, lambda: call(None)) is (argument not in DEFAULTED)


@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_of_any_kind_is_that_number_and_all_else_is_refused(field: str) -> None:
    wanted = sampled(**{field: 0.5})
    half = [np.float32(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16)]
    for value in (*half, fractions.Fraction(1, 2)):
        assert sampled(**{field: value}) == wanted
        assert type(getattr(sampled(**{field: value}), field)) is float
    for three in THREES:
        assert sampled(**{field: three}) == sampled(**{field: 3})
    for value in (*NO_NUMBERS, -0.5, 1e39, 10**400, torch.tensor([0.5]), np.array([0.5])):
        assert refused(field, lambda value=value: sampled(**{field: value})), repr(type(value))  # type: ignore[misc]


def allowed_only(value: Any) -> Any:
    """What is answered where these are the only tokens allowed."""
    return answer(canvas=dg.Canvas(allowed=value))


# Every public argument that takes a sequence of ids, and whether None and a set may stand in its place.
SEQUENCES: dict[str, tuple[str, Callable[[Any], Any], bool, bool]] = {
    "generate.prompt": ("prompt", lambda value: answer(prompt=value), False, False),
    "submit.prompt": ("prompt", lambda value: dg.Scheduler(smallest_model()).submit(value, 3).prompt_ids, False, False),
    "Canvas.tokens": ("canvas.tokens", lambda value: answer(canvas=dg.Canvas(tokens=value)), False, False),
    "Canvas.allowed": ("canvas.allowed", allowed_only, True, True),
    "Canvas.allowed by position": ("canvas.allowed", lambda value: allowed_only([value, None, [7]]), True, True),
    "SamplerConfig.eos_token_ids": ("eos_token_ids", lambda value: sampled(eos_token_ids=value), True, True),
    "encode.slots": ("slots", lambda value: slotted(value), True, False),
    "encode.lengths": ("lengths", lambda value: encoded(value), True, False),
    "Tokenizer.decode": ("ids", lambda value: random_model().tokenizer.decode(value), False, False),  # type: ignore[union-attr]
}


def slotted(slots: Any) -> list[int]:
    model = smallest_model()
    cache = model.new_cache(6, 24)
    model.encode([[3], [4], [5]], cache, slots=slots)  # type: ignore[arg-type]
    return [cache.length(slot) for slot in range(6)] if slots is not None else [0, 0, 0, 1, 1, 1]


def encoded(lengths: Any) -> list[int]:
    model = smallest_model()
    cache = model.new_cache(3, 24)
    model.encode(np.full((3, 5), 3), cache, lengths=lengths)  # type: ignore[arg-type]
    return [cache.length(slot) for slot in range(3)]


@pytest.mark.parametrize("argument", SEQUENCES)
def test_a_sequence_of_any_kind_is_that_list_and_all_else_is_refused(argument: str) -> None:
    name, call, or_none, or_set = SEQUENCES[argument]
    wanted = call([3, 4, 5])
    for value in same_as_sequence([3, 4, 5]):
        assert call(value) == wanted, repr(type(value))
    for value in [*NO_SEQUENCES, *NO_IDS]:
        if value is None and or_none:
            continue
        if argument == "Canvas.tokens" and value is NO_IDS[0]:
            continue  # noise in the second position
        if argument == "generate.prompt" and isinstance(value, str):
            assert refused("prompt", lambda value=value: call(value))  # type: ignore[misc]  # text, without a tokenizer
            continue
        assert refused(name, lambda value=value: call(value)), repr(value)  # type: ignore[misc]
    assert refused(name, lambda: call({3, 4, 5})) is not or_set
    if or_set:
        assert call({3, 4, 5}) == wanted


def test_masks_are_flags_of_any_kind() -> None:
    wanted = dg.Canvas([3, 4], pinned=[True, False])
    for mask in (np.array([True, False]), torch.tensor([True, False]), (1, 0), np.array([1, 0]), [np.True_, np.False_]):
        assert dg.Canvas([3, 4], pinned=mask) == wanted
    for mask in ([1.0, 0.0], [2, 0], ["yes", ""], [None, True], "10", b"10", 1, torch.tensor([1.0, 0.0]), Odd()):
        assert refused("canvas.pinned", lambda mask=mask: dg.Canvas([3, 4], pinned=mask))  # type: ignore[misc]
    for value in (1, np.True_, torch.tensor(True), np.array(True)):
        assert dg.SamplerConfig(trim_canvas=value).trim_canvas is True
    for value in ("no", 2, 1.0, [True], Odd()):
        assert refused("trim_canvas", lambda value=value: dg.SamplerConfig(trim_canvas=value))  # type: ignore[misc]


def test_ids_by_row_are_a_tensor_an_array_or_lists() -> None:
    wanted = logits()
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        given = torch.tensor([[3, 4, 5]], dtype=dtype)
        assert logits(ids=given, canvas=given) == wanted
        assert logits(ids=given.numpy(), canvas=given.numpy()) == wanted
    assert logits(ids=[torch.tensor([3, 4, 5])], canvas=((3, np.int64(4), 5),)) == wanted
    ragged: list[Any] = [[], [[3, 4], [5]], [3, 4, 5], [[[3, 4, 5]]], torch.tensor([3, 4, 5]), np.zeros((1, 2, 3), int)]
    floats: list[Any] = [[[3.0, 4, 5]], torch.tensor([[3.0]]), torch.tensor([[True]]), [[2**40, 3]], [[-1, 3]], "345"]
    for value in (*ragged, *floats, None, 3, Odd(), torch.empty((1, 3), dtype=torch.int64, device="meta")):
        assert refused("ids", lambda value=value: logits(ids=value)), repr(type(value))  # type: ignore[misc]
        assert refused("canvas", lambda value=value: logits(canvas=value)), repr(type(value))  # type: ignore[misc]


# Batches --------------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_sequence_of_prompts_of_any_kind() -> None:
    prompts = [[3, 4, 5], [6, 7, 8]]
    wanted = answer(prompt=prompts, seed=[1, 2])
    assert len(wanted) == 2
    for batch in (tuple(prompts), np.array(prompts), torch.tensor(prompts), [np.array(prompts[0]), prompts[1]]):
        assert answer(prompt=batch, seed=[1, 2]) == wanted
    for seeds in ((1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), torch.tensor(2)]):
        assert answer(prompt=prompts, seed=seeds) == wanted
    assert answer(prompt=prompts, seed=[1, 2], canvas=np.array([None, None])) == wanted
