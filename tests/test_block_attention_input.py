"""Bad input to the operators of block attention, and the errors that name it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backend import cpu_only
from block_attention_cases import NAN
from dgemma_ext.ops import block_attention

# The exceptions of a raw op: ValueError for invalid arguments, RuntimeError for the rest, and NotImplementedError
# from the dispatcher for tensors on several devices.
RAW_ERRORS = (ValueError, RuntimeError, NotImplementedError)


def good_arguments() -> dict[str, Any]:
    """Valid arguments of causal_attention: 2 requests of 5 rows, 3 slots of 9 rows."""
    ids = [torch.tensor(x, dtype=torch.int32) for x in ([2, 0], [9, 4], [5, 3])]
    return {
        "query": torch.zeros(2, 5, 4, 8),
        "key": torch.zeros(2, 5, 2, 8),
        "value": torch.zeros(2, 5, 2, 8),
        "prefix_key": torch.zeros(3, 9, 2, 8),
        "prefix_value": torch.zeros(3, 9, 2, 8),
        "slot": ids[0],
        "prefix_length": ids[1],
        "length": ids[2],
        "spans": torch.tensor([[[9, 11]], [[0, 0]]], dtype=torch.int32),
        "window": 0,
        "scale": 1.0,
    }


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD: list[tuple[str, Any]] = [
    ("query", torch.zeros(2, 5, 4, 8, dtype=torch.float16)),
    ("query", torch.zeros(2, 5, 4, 8, dtype=torch.bfloat16)),
    ("query", torch.zeros(2, 5, 32)),
    ("query", torch.zeros(2, 5, 3, 8)),
    ("query", torch.zeros(2, 5, 0, 8)),
    ("query", torch.zeros(2, 4, 4, 8)),
    ("query", torch.zeros(2, 4, 5, 8).transpose(1, 2)),
    ("query", torch.zeros(2, 5, 4, 8, device="meta")),
    ("key", torch.zeros(2, 5, 8)),
    ("key", torch.zeros(2, 5, 2, 8, dtype=torch.float64)),
    ("value", torch.zeros(2, 5, 2, 7)),
    ("value", torch.zeros(2, 5, 1, 8).expand(2, 5, 2, 8)),
    ("prefix_key", torch.zeros(3, 2, 8)),
    ("prefix_key", torch.zeros(3, 9, 2, 8, dtype=torch.bfloat16)),
    ("prefix_value", torch.zeros(3, 8, 2, 8)),
    ("slot", torch.zeros(2, dtype=torch.int64)),
    ("slot", ints(0)),
    ("slot", ints(0, 3)),
    ("slot", ints(-2, 0)),
    ("prefix_length", ints(3, -1)),
    ("prefix_length", ints(10, 0)),  # ten positions in nine rows, and no window
    ("prefix_length", ints(2**31 - 1, 0)),
    ("length", ints(6, 5)),
    ("length", ints(-1, 5)),
    ("length", ints([5, 5])),
    ("spans", ints([9, 11], [0, 0])),
    ("spans", ints([[9, 8]], [[0, 0]])),
    ("spans", ints([[-1, 3]], [[0, 0]])),
    ("spans", ints([[1, 2]])),
    ("spans", torch.zeros(2, 1, 2)),
    ("window", -1),
    ("scale", NAN),
]
BAD_IDS = [f"{name}_{i}" for i, (name, _) in enumerate(BAD)]
NUMBERS = ("query", "key", "value")


def named(name: str) -> str:
    """A pattern for messages about an argument, or about one number in it."""
    return rf"(^|: )({name})(\[[\d, ]+\])?: got .*, wants "


@cpu_only
@pytest.mark.parametrize(("name", "bad"), BAD, ids=BAD_IDS)
def test_bad_input(name: str, bad: Any) -> None:
    """The wrapper names the argument in a ValueError; the raw op refuses it too."""
    arguments = good_arguments()
    block_attention.causal_attention(**arguments)
    arguments[name] = bad
    canvas = {k: v for k, v in arguments.items() if k != "spans"}
    # A block tensor whose type or shape differs from its peers' is named by the check that comes second.
    pattern = named("|".join(("query", "key", "value", "prefix_key")) if name in NUMBERS else name)
    with pytest.raises(ValueError, match=pattern):
        block_attention.causal_attention(**arguments)
    on_meta = isinstance(bad, torch.Tensor) and bad.is_meta  # on meta tensors the raw op only computes a shape
    if not on_meta:
        with pytest.raises(RAW_ERRORS):
            torch.ops.dgemma.causal_attention(*arguments.values())
    if name != "spans":
        with pytest.raises(ValueError, match=pattern):
            block_attention.canvas_attention(**canvas)
        if not on_meta:
            with pytest.raises(RAW_ERRORS):
                torch.ops.dgemma.canvas_attention(*canvas.values())


@cpu_only
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("key", torch.zeros(2, 5, 2, 8, dtype=torch.int32)),
        ("key", torch.zeros(2, 5, 2, 4)),
        ("value", torch.zeros(2, 5, 2, 8, dtype=torch.bfloat16)),
        ("prefix_value", torch.zeros(3, 2, 9, 8).transpose(1, 2)),
        ("slot", ints(1, 1)),
        ("slot", ints(3, 1)),
        ("prefix_length", ints(-5, 0)),
        ("prefix_length", ints(2**31 - 3, 0)),
        ("length", ints(6, 0)),
    ],
)
def test_bad_append(name: str, bad: torch.Tensor) -> None:
    arguments = {k: v for k, v in good_arguments().items() if k not in ("query", "spans", "window", "scale")}
    block_attention.append_to_cache(**arguments)
    arguments[name] = bad
    with pytest.raises(ValueError, match=named("key|value|prefix_key" if name == "key" else name)):
        block_attention.append_to_cache(**arguments)
    with pytest.raises(RAW_ERRORS):
        torch.ops.dgemma.append_to_cache(*arguments.values())


@cpu_only
def test_bad_out_and_workspace() -> None:
    arguments = good_arguments()
    query, size = arguments["query"], block_attention.attention_workspace(arguments["query"], arguments["key"]).numel()
    good = {"out": torch.zeros_like(query), "workspace": torch.zeros(size, dtype=torch.uint8)}
    block_attention.causal_attention(**arguments, **good)
    for name, bad in (
        ("out", torch.zeros(2, 5, 4, 9)),
        ("out", torch.zeros_like(query, dtype=torch.bfloat16)),
        ("out", torch.zeros(2, 4, 5, 8).transpose(1, 2)),
        ("workspace", torch.zeros(size - 1, dtype=torch.uint8)),
        ("workspace", torch.zeros(0, dtype=torch.uint8)),
        ("workspace", torch.zeros(size)),
        ("workspace", torch.zeros(2 * size, dtype=torch.uint8)[::2]),
    ):
        with pytest.raises(ValueError, match=named(name)):
            block_attention.causal_attention(**arguments, **{**good, name: bad})
        with pytest.raises(RAW_ERRORS, match=name):
            torch.ops.dgemma.causal_attention.out(*arguments.values(), **{**good, name: bad})


@cpu_only
def test_unknown_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGEMMA_CPU", "mmx")
    with pytest.raises(ValueError, match="DGEMMA_CPU"):
        block_attention.causal_attention(**good_arguments())
