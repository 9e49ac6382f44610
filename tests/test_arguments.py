"""What arguments may be: every public argument takes what is an integer, a number, a flag or a sequence in Python's,
numpy's or torch's sense as if it were Python's own, and refuses everything else by its name.
"""

from __future__ import annotations

import array
import enum
import fractions
import random
import re
from collections import UserList, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_ext as dg
from dgemma_ext import arguments, demo
from dgemma_ext.demo import puzzles
from dgemma_ext.profile import profile
from models import random_model, smallest_model

LENGTH = 4  # of the smallest model's canvas
SAMPLER = dg.SamplerConfig(max_denoising_steps=2)


class Three(enum.IntEnum):
    THREE = 3


class Odd:
    """An object with the methods of an integer and of a sequence, which all fail."""

    def __index__(self) -> int:
        raise OSError("no")

    def __float__(self) -> float:
        raise OSError("no")

    def __len__(self) -> int:
        raise OSError("no")

    def __getitem__(self, index: int) -> int:
        raise OSError("no")

    def __fspath__(self) -> str:
        raise OSError("no")

    def __repr__(self) -> str:
        raise OSError("no")


class Pair:
    """A sequence that is no collections.abc.Sequence."""

    def __init__(self, *entries: Any) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Any:
        return self.entries[index]


# What is the integer 3 ------------------------------------------------------------------------------------------------

THREES = [
    3,
    Three.THREE,
    np.int8(3),
    np.uint64(3),
    np.int64(3),
    np.array(3),
    np.array([3, 4])[0],
    torch.tensor(3),
    torch.tensor(3, dtype=torch.uint8),
    torch.tensor([3, 4])[0],
]
# What is no integer at all, and no number, flag, sequence or text.
NOTHING = [Odd(), object(), print, {3}, {3: 3}, 3j, np.complex64(3), np.timedelta64(3, "ns"), torch.tensor(3j)]
NO_NUMBERS = [
    *NOTHING,
    "3",
    b"3",
    np.str_("3"),
    True,
    np.True_,
    np.array(True),
    torch.tensor(True),
    torch.tensor([3]),
    np.array([3]),
    [3],
    torch.empty((), dtype=torch.int64, device="meta"),
    float("nan"),
    float("inf"),
    np.float32("nan"),
    torch.tensor(float("-inf")),
]
NO_INTEGERS = [*NO_NUMBERS, 3.0, np.float64(3), torch.tensor(3.0), fractions.Fraction(3), -1, 2**63, 10**400]


def same_as_sequence(values: list[int]) -> list[Any]:
    """Sequences of these integers, in every sense of the word."""
    return [
        tuple(values),
        deque(values),
        UserList(values),
        Pair(*values),
        array.array("q", values),
        np.array(values),
        np.array(values, dtype=np.int16),
        np.array(values, dtype=object),
        torch.tensor(values),
        torch.tensor(values, dtype=torch.int32),
        [np.int64(value) for value in values],
        [torch.tensor(value) for value in values],
        iter_free_range(values),
    ]


def iter_free_range(values: list[int]) -> Any:
    steps = range(values[0], values[-1] + 1)
    return steps if list(steps) == values else list(values)


NO_SEQUENCES = [
    None,
    3,
    np.int64(3),
    torch.tensor(3),
    "345",
    b"345",
    bytearray(b"345"),
    memoryview(b"345"),
    {3: 4},
    iter([3, 4, 5]),
    (token for token in (3, 4, 5)),
    object(),
    Odd(),
    torch.empty(3, dtype=torch.int64, device="meta"),
]
# Sequences whose entries are no ids.
NO_IDS = [
    [3, None, 5],
    [3, 4.0, 5],
    [True, False, True],
    ["3", "4", "5"],
    [3, -4, 5],
    [3, 2**40, 5],
    [Odd(), 4, 5],
    np.array([3.0, 4.0, 5.0]),
    np.array([True, False, True]),
    np.array(["3", "4", "5"]),
    np.array([3, 4, 5], dtype="timedelta64[ns]"),
    np.array([3, 4, 5], dtype="datetime64[ns]"),
    torch.tensor([3.0, 4.0, 5.0]),
    torch.tensor([True, False, True]),
    torch.tensor([3j, 4, 5]),
]


def answer(**changes: Any) -> Any:
    """The answer of the smallest model to [3, 4, 5], with some arguments changed."""
    return smallest_model().generate(**({"prompt": [3, 4, 5], "max_new_tokens": 3, "sampler": SAMPLER} | changes))


def sampled(**changes: Any) -> Any:
    return dg.SamplerConfig(**changes)


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
NUMBERS = ("entropy_bound", "t_min", "t_max", "confidence_threshold")


def refused(name: str, call: Callable[[], Any]) -> bool:
    """Whether a call raises a ValueError of one line that names the argument; any other exception is an error."""
    try:
        call()
    except ValueError as error:
        message = str(error)
        assert re.search(rf"(^|\W){re.escape(name)}(\[|\W|$)", message), message
        assert "\n" not in message
        return True
    return False


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [[3], [4, None]]}, r"prompt\[1\]\[1\] must be a token id in \[0, 300\), got None"),
        ({"prompt": [[3], 4]}, r"prompt\[1\] must be a string, a chat or token ids, got 4"),
        ({"prompt": [[3], []]}, r"prompt\[1\] is empty"),
        ({"prompt": [[3], "text"]}, r"prompt\[1\] is text, and the checkpoint has no tokenizer"),
        ({"prompt": [[3], [4]], "seed": [1]}, "seed must be one value or 2, one per prompt, got 1"),
        ({"prompt": [[3], [4]], "seed": [1, 1.5]}, r"seed must be an integer in \[0, 2\*\*63\), got 1.5"),
        ({"prompt": [[3], [4]], "canvas": [None]}, "canvas must be one value or 2, one per prompt"),
        ({"canvas": [[3, 4, 5]]}, r"canvas must be a dg.Canvas or None, or a list of them, got \[3, 4, 5\] \(list\)"),
        ({"canvas": {}}, r"canvas must be a dg.Canvas or None, or a list of them, got \{\} \(dict\)"),
        ({"sampler": {}}, r"sampler must be a dg.SamplerConfig or None, got \{\} \(dict\)"),
        ({"sampler": {"t_min": 0.1}}, r"sampler must be a dg.SamplerConfig or None, got \{'t_min': 0.1\} \(dict\)"),
        ({"on_draft": "print"}, "on_draft must be a function or None, got 'print'"),
        ({"max_new_tokens": 2**31}, r"max_new_tokens must be an integer in \[1, 2\*\*31\), got 2147483648"),
    ],
)
def test_the_message_says_what_came_and_what_is_wanted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        answer(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dg.Canvas(tokens="text"), "canvas.tokens must be a sequence of token ids and None, got 'text'"),
        (lambda: dg.Canvas(allowed=[[3], 4]), r"canvas.allowed\[1\] must be a list of token ids or None, got 4"),
        (lambda: dg.Canvas(allowed=[[3], [4, "5"]]), r"canvas.allowed\[1\]\[1\] must be an integer .* got '5'"),
        (lambda: dg.SamplerConfig(eos_token_ids=106), "eos_token_ids must be a sequence of token ids, got 106"),  # type: ignore[arg-type]
        (lambda: dg.Scheduler("model"), "model must be a dg.DiffusionGemma, got 'model'"),  # type: ignore[arg-type]
        (
            lambda: dg.Scheduler(smallest_model(), driver="fast"),
            "driver must be one of eager, async, graph, got 'fast'",
        ),
        (
            lambda: dg.Scheduler(smallest_model(), max_length=65),
            r"max_length must be in \[1, 64\], the model's context",
        ),
        (lambda: dg.Scheduler(smallest_model(), batched="no"), "batched must be True or False, got 'no'"),  # type: ignore[arg-type]
        (lambda: smallest_model().denoise([[3]], "cache"), "cache must be a dg.Cache, got 'cache'"),  # type: ignore[arg-type]
        (lambda: demo.draw(7, 1), "size must be one of 6, 9, got 7"),
        (lambda: demo.draw("6", 1), r"size must be an integer in \[0, 2\*\*31\), got '6'"),  # type: ignore[arg-type]
        (lambda: demo.check("1", "12"), "puzzle must be a line of 36 or 81 characters, got '12'"),
        (lambda: puzzles.generate(6, 7, random.Random(0)), r"clues must be an integer in \[8, 37\), got 7"),
        (lambda: puzzles.generate(9, 82, random.Random(0)), r"clues must be an integer in \[17, 82\), got 82"),
    ],
)
def test_objects_say_what_is_wrong_when_they_are_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_a_number_of_clues_that_is_not_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puzzles, "_ATTEMPTS", 3)
    with pytest.raises(ValueError, match=r"^clues is 17, and none of 3 random grids has a puzzle with so few"):
        puzzles.generate(9, 17, random.Random(0))


# Loading --------------------------------------------------------------------------------------------------------------


def load(**changes: Any) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(**({"path_or_hub_id": demo.checkpoint(6)} | changes))


@pytest.mark.parametrize("argument", ["path_or_hub_id", "device", "dtype", "weights", "batch_invariant", "activations"])
def test_from_pretrained_refuses_what_it_cannot_use_by_name(argument: str) -> None:
    values = [*NOTHING, 3, 3.5, "", b"", [], torch.float16, np.array([1, 2])]
    for value in values if argument == "activations" else (None, *values):
        with pytest.raises(ValueError, match=f"^{argument} must be "):
            load(**{argument: value})
    if argument == "path_or_hub_id":
        with pytest.raises(dg.CheckpointError, match=r"^nonsense: does not exist"):
            load(path_or_hub_id="nonsense")


def test_a_path_of_any_kind_is_that_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").symlink_to(demo.checkpoint(6))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = str(demo.checkpoint(6))
    for path in (folder, folder.encode(), np.str_(folder), "~/model", Path("~/model"), "6x6"):
        assert load(path_or_hub_id=path).config.canvas_length == 37
    assert dg.DiffusionGemma.from_pretrained("demo").config.canvas_length == 82
    assert load(device=torch.device("cpu"), dtype=torch.float32).dtype == torch.float32
    # A folder of a bundled model's name is reached by a path.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(dg.CheckpointError):
        load(path_or_hub_id="./demo")


def test_the_bundled_names_are_those_of_the_sizes_that_they_solve() -> None:
    for size, folder in demo.checkpoints().items():
        assert dg.ModelConfig.from_file(folder).canvas_length == size * size + 1


# Any value whatever ---------------------------------------------------------------------------------------------------

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
