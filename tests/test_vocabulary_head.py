"""vocabulary_head on every backend: the product against float64, the statistics against those of the stored logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.nn import functional

from backend import DTYPES
from bounds import assert_close
from denoise_cases import NAN, Case, bits, make_case
from dgemma_ext.ops.vocabulary_head import vocabulary_head
from test_denoise_statistics import assert_statistics


def make_operands(case: Case, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Hidden states and an embedding whose products spread like a trained head's."""
    batch, length, vocabulary = case.logits.shape
    dtype = case.logits.dtype
    hidden = torch.randn(batch, length, hidden_size).to(dtype)
    return hidden, (torch.randn(vocabulary, hidden_size) * (4 / hidden_size**0.5)).to(dtype)


def head_params(case: Case) -> dict[str, Any]:
    return {name: value for name, value in case.logits_params.items() if name != "logits"}


# Lengths above, below and at a tile of 128 rows; hidden sizes with and without a whole last step of 64.
SIZES = [(2, 24, 1000, 64), (1, 37, 384, 96), (1, 130, 257, 136), (1, 128, 640, 200), (3, 1, 129, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "length", "vocabulary", "hidden_size"), SIZES)
def test_product_and_statistics(
    batch: int, length: int, vocabulary: int, hidden_size: int, masked: bool, dtype: torch.dtype
) -> None:
    case = make_case(dtype, batch=batch, length=length, vocabulary=vocabulary, masked=masked)
    hidden, embedding = make_operands(case, hidden_size)
    buffer = torch.full_like(case.logits, NAN)
    logits, statistics = vocabulary_head(hidden, embedding, **head_params(case), logits=buffer)
    assert logits is buffer
    exact = hidden.double() @ embedding.double().T
    # One rounding from fp32: half a unit in the last place of each value, and the error of fp32 sums.
    in_order = torch.stack([functional.linear(row, embedding) for row in hidden])
    assert_close(logits, exact, dtype, in_order)
    if dtype == torch.bfloat16:
        off = (logits.double() - exact).abs() > exact.abs() * 2.0**-8 + 1e-4
        assert not bool(off.any()), "rounded more than once"
    stored = torch.where(case.mask, logits, NAN) if masked else logits
    assert_statistics(replace(case, logits=stored), statistics)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inactive_requests_are_neither_read_nor_written(dtype: torch.dtype) -> None:
    case = replace(make_case(dtype, batch=3, length=9, vocabulary=300), active=torch.tensor([True, False, True]))
    hidden, embedding = make_operands(case, 64)
    hidden[1] = NAN
    buffer = torch.full_like(case.logits, 7.0)
    logits, statistics = vocabulary_head(hidden, embedding, **head_params(case), logits=buffer)
    assert bool((logits[1] == 7.0).all())
    assert bool((statistics.row_sum[1] == 0).all())
    assert bool(torch.isfinite(statistics.entropy).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    case = make_case(dtype, batch=3, length=20, vocabulary=500)
    hidden, embedding = make_operands(case, 72)
    together, statistics = vocabulary_head(hidden, embedding, **head_params(case))
    for b in range(3):
        alone, its = vocabulary_head(hidden[b : b + 1].contiguous(), embedding, **head_params(case.request(b)))
        assert bits(alone[0]) == bits(together[b])
        for name, tensor in its._asdict().items():
            assert bits(tensor[0]) == bits(getattr(statistics, name)[b]), name


def test_a_hidden_state_that_is_not_finite_ends_its_row() -> None:
    case = make_case(DTYPES[0], batch=1, length=6, vocabulary=300)
    hidden, embedding = make_operands(case, 64)
    hidden[0, 3, 5] = NAN
    _, statistics = vocabulary_head(hidden, embedding, **head_params(case))
    finite = torch.tensor([True, True, True, False, True, True])
    assert torch.equal(torch.isfinite(statistics.entropy[0]).cpu(), finite.cpu())
    assert torch.equal(torch.isfinite(statistics.row_sum[0]).cpu(), finite.cpu())


@pytest.mark.parametrize("name", ["hidden", "embedding", "logits", "temperature"])
def test_bad_input(name: str) -> None:
    case = make_case(DTYPES[0], batch=2, length=4, vocabulary=300)
    hidden, embedding = make_operands(case, 64)
    arguments = {"hidden": hidden, "embedding": embedding, **head_params(case), "logits": torch.empty_like(case.logits)}
    arguments[name] = arguments[name][:1, :1] if arguments[name].dim() > 1 else arguments[name][:1]
    with pytest.raises((ValueError, RuntimeError), match=rf"({name}|logits|temperature): got .*wants"):
        vocabulary_head(**arguments)
    with pytest.raises((ValueError, RuntimeError)):
        vocabulary_head(**{**arguments, name: arguments[name].double()})


def test_opcheck() -> None:
    case = make_case(DTYPES[0], batch=2, length=4, vocabulary=300)
    hidden, embedding = make_operands(case, 64)
    logits, statistics = vocabulary_head(hidden, embedding, **head_params(case))
    operands = (hidden, embedding, *head_params(case).values(), logits, *statistics)
    library.opcheck(torch.ops.dgemma.vocabulary_head.default, operands)
