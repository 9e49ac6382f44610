"""Values that are and that are not an integer, a number or a sequence of ids in Python's, numpy's or torch's sense, and
what the smallest model makes of them.
"""

from __future__ import annotations

import array
import enum
import fractions
import re
from collections import UserList, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import dgemma_ext as dg
from models import smallest_model

SAMPLER = dg.SamplerConfig(max_denoising_steps=2)
NUMBERS = ("entropy_bound", "t_min", "t_max", "confidence_threshold")  # of a SamplerConfig


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
