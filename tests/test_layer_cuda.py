"""token_embedding and rms_norm of the CUDA kernels, which no operator of torch's reaches: on the host's test bed."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bounds import assert_close
from c_interface import INVALID_ARGUMENT, OK, UNSUPPORTED, call
from c_operations import layer_operations
from sim.build import ROOT, SUPPORTED, sim_library
from test_c_operators import in_double, plain

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")

SOURCES = [*sorted((ROOT / "csrc" / "layer").rglob("*.cu")), ROOT / "csrc" / "cuda" / "entry.cu"]
BF16 = torch.bfloat16
OPTIONS = {"token_embedding": ["all", "conditioning", "normalise"], "rms_norm": ["all", "weight"]}
NEIGHBOURS = 0.01  # of the values, whose sums are made in another order


@cache
def library() -> ctypes.CDLL:
    return sim_library("layer", SOURCES)


def aligned(values: dict[str, Any]) -> dict[str, Any]:
    """torch aligns its tensors to 64 bytes."""
    assert all(v.data_ptr() % 16 == 0 for v in values.values() if isinstance(v, Tensor))
    return values


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("tokens", "hidden"), [(3, 2816), (9, 96), (2, 8), (1, 8192)])
@pytest.mark.parametrize(("name", "option"), [(name, option) for name in OPTIONS for option in OPTIONS[name]])
def test_against_torch(name: str, option: str, tokens: int, hidden: int, seed: int) -> None:
    """With all that it can be given, and without one of these."""
    library().sim_set_seed(ctypes.c_uint64(seed))
    values = aligned(layer_operations(BF16, tokens, hidden)[name])
    if option != "all":
        values[option] = 0 if option == "normalise" else None
    status, message = call(library(), f"cuda_{name}", **values)
    assert status == OK, message
    wanted, got = plain(name, values)["output"], values["output"]
    assert float((got != wanted).float().mean()) <= NEIGHBOURS
    assert_close(got, plain(name, in_double(values))["output"], BF16, wanted)


def test_an_unknown_id_gives_a_row_of_nan() -> None:
    values = layer_operations(BF16, 4, 64)["token_embedding"]
    values["ids"][1], values["ids"][2] = -1, values["vocabulary"]
    assert call(library(), "cuda_token_embedding", **values)[0] == OK
    assert torch.isnan(values["output"]).all(dim=1).tolist() == [False, True, True, False]
    assert not bool(torch.isnan(values["output"][[0, 3]]).any())


def test_refusals() -> None:
    for name in OPTIONS:
        values = layer_operations(BF16, 4, 64)[name]
        for changed, status, words in [
            ({"hidden_size": 60}, UNSUPPORTED, "hidden_size: got 60"),
            ({"dtype": 0}, UNSUPPORTED, "dtype: got 0"),
            ({"tokens": -1}, INVALID_ARGUMENT, "tokens: got -1"),
            ({"output": None}, INVALID_ARGUMENT, "output: got "),
            ({"output": values["output"].data_ptr() + 2}, INVALID_ARGUMENT, "output: got 0x"),
        ]:
            got, message = call(library(), f"cuda_{name}", **{**values, **changed})
            assert (got, message[: len(words)]) == (status, words)
    values = layer_operations(BF16, 4, 64)["token_embedding"]
    assert call(library(), "cuda_token_embedding", **{**values, "vocabulary": 0})[0] == INVALID_ARGUMENT
