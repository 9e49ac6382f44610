"""Any value whatever as an argument: it is taken, or refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_ext as dg
from argument_values import NO_IDS, NO_INTEGERS, NO_SEQUENCES, NUMBERS, THREES, refused, same_as_sequence, sampled
from models import smallest_model

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.sampled_from([*THREES, *NO_INTEGERS]),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=4),
    st.lists(st.integers(-2, 400), max_size=4),
    st.lists(st.lists(scalars, max_size=3), max_size=3),
    st.lists(st.integers(-2, 400), max_size=4).map(np.array),
    st.lists(st.integers(-2, 400), max_size=4).map(torch.tensor),
    st.dictionaries(st.text(max_size=2), scalars, max_size=2),
    st.sampled_from([*NO_SEQUENCES, *NO_IDS]),
)

# Called without a model's pass, so that hundreds of values take seconds.
CALLS: dict[str, Callable[[Any], Any]] = {
    **{
        f"submit.{name}": lambda value, name=name: idle().submit(
            **({"prompt": [3], "max_new_tokens": 3} | {name: value})
        )  # type: ignore[misc]
        for name in ("prompt", "max_new_tokens", "sampler", "seed", "canvas", "logprobs", "deadline")
    },
    **{
        f"SamplerConfig.{name}": lambda value, name=name: sampled(**{name: value})  # type: ignore[misc]
        for name in (*NUMBERS, "max_denoising_steps", "stability_threshold", "eos_token_ids", "trim_canvas")
    },
    **{
        f"Canvas.{name}": lambda value, name=name: idle().submit([3], 3, canvas=dg.Canvas(**{name: value}))  # type: ignore[misc]
        for name in ("tokens", "pinned", "allowed", "start_step")
    },
}


def idle() -> dg.Scheduler:
    """A scheduler that runs nothing; its requests are dropped with it."""
    return dg.Scheduler(smallest_model(), max_batch=1, max_length=24)


@pytest.mark.parametrize("argument", CALLS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(value=values)
def test_any_value_is_taken_or_refused_by_name(argument: str, value: Any) -> None:
    name = argument.partition(".")[2]
    refused(f"canvas.{name}" if argument.startswith("Canvas") else name, lambda: CALLS[argument](value))


ids = st.lists(st.integers(-3, 310), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens=ids, how=st.integers(0, 12))
def test_a_list_of_tokens_is_the_same_in_every_form(tokens: list[int], how: int) -> None:
    given = same_as_sequence(tokens)[how]
    if all(0 <= token < 300 for token in tokens):
        assert idle().submit(given, 3).prompt_ids == tokens
        assert list(dg.Canvas(tokens=given).tokens) == tokens
    else:
        assert refused("prompt", lambda: idle().submit(given, 3))
