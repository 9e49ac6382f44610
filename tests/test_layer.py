"""The operators between a layer's products, on every backend, against torch's operators and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library

from backend import BACKEND, DTYPES
from bounds import assert_close
from denoise_cases import bits
from dgemma_ext.ops import layer
from dgemma_ext.ops.plain import layer as layer_plain

EPSILON = 1e-6
# The share of a result's values that may round to the neighbour: sums have another order.
NEIGHBOURS = 0.01
GELU_NEIGHBOURS = 0.1  # 1 + tanh cancels far below zero, and each tanh rounds in its own way
# tokens and hidden sizes: the model's, the bundled models', one lane, a row of all threads
ROWS = [(5, 2816), (37, 96), (3, 128), (1, 8), (2, 8192)]
# More on the CPU: values left of a vector, vectors left of a turn, sums of sums of blocks (csrc/cpu/rows.h).
ROWS += [(5, 133), (3, 1016), (2, 8 * 8192 + 517)] if BACKEND == "cpu" else []
# tokens, query heads, key heads, width
HEADS = [(4, 16, 8, 256), (3, 16, 2, 512), (37, 4, 4, 32), (5, 3, 1, 64), (2, 1, 1, 6)]


def tensor(dtype: torch.dtype, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return (torch.randn(*shape) * scale + offset).to(dtype)


def same_but_for_neighbours(got: Tensor, wanted: Tensor, neighbours: float) -> None:
    """Equal up to a few values, whose error other checks bound; on the CPU equal, but for sums of fewer values than
    torch's vector has."""
    if BACKEND == "cpu" and neighbours == NEIGHBOURS and got.shape[-1] >= 8:
        assert bits(got) == bits(wanted)
    assert got.dtype == wanted.dtype
    if got.dtype == torch.bfloat16:
        assert float((got != wanted).float().mean()) <= neighbours


def check(name: str, operands: list[Any]) -> tuple[Tensor, ...]:
    got = getattr(layer, name)(*operands)
    plain: Callable[..., Any] = getattr(layer_plain, name)
    wanted = plain(*operands)
    wide = plain(*(o.double() if isinstance(o, Tensor) else o for o in operands))
    pairs = zip(got, wanted, wide, strict=True) if isinstance(got, tuple) else [(got, wanted, wide)]
    for mine, theirs, exact in pairs:
        same_but_for_neighbours(mine, theirs, GELU_NEIGHBOURS if name == "gelu_product" else NEIGHBOURS)
        assert_close(mine, exact, mine.dtype, theirs)
    return got if isinstance(got, tuple) else (got,)


def head_operands(tokens: int, heads: int, key_heads: int, width: int, dtype: torch.dtype, value: bool) -> list[Any]:
    angles = torch.rand(tokens, width // 2) * 6.3
    angles = torch.cat((angles, angles), dim=-1)
    key_shape = (tokens, key_heads, width)
    return [
        tensor(dtype, tokens, heads, width, scale=3.0),
        tensor(dtype, *key_shape, scale=2.0),
        tensor(dtype, *key_shape) if value else None,
        tensor(dtype, width, scale=0.2, offset=1.0),
        tensor(dtype, width, scale=0.2, offset=1.0),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        EPSILON,
    ]


def residual_operands(tokens: int, hidden: int, dtype: torch.dtype) -> list[Any]:
    weights = [tensor(dtype, hidden, scale=0.3, offset=1.0) for _ in range(3)]
    return [tensor(dtype, tokens, hidden, scale=5.0), tensor(dtype, tokens, hidden), *weights, EPSILON]


def output_operands(tokens: int, hidden: int, dtype: torch.dtype) -> list[Any]:
    rows = [tensor(dtype, tokens, hidden, scale=scale) for scale in (5.0, 0.1, 2.0)]
    weights = [tensor(dtype, hidden, scale=0.3, offset=1.0) for _ in range(4)]
    return [*rows, *weights, 0.37, EPSILON]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("tokens", "hidden"), ROWS)
def test_row_norm(tokens: int, hidden: int, weighted: bool, dtype: torch.dtype) -> None:
    x = tensor(dtype, tokens, hidden, scale=5.0)
    weight = tensor(dtype, hidden, scale=0.3, offset=1.0) if weighted else None
    got, wanted = layer.row_norm(x, weight, EPSILON), layer_plain.rms_norm(x, weight, EPSILON)
    same_but_for_neighbours(got, wanted, NEIGHBOURS)
    exact = layer_plain.rms_norm(x.double(), None if weight is None else weight.double(), EPSILON)
    assert_close(got, exact, dtype, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(("tokens", "heads", "key_heads", "width"), HEADS)
def test_normalise_heads(tokens: int, heads: int, key_heads: int, width: int, value: bool, dtype: torch.dtype) -> None:
    check("normalise_heads", head_operands(tokens, heads, key_heads, width, dtype, value))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), ROWS)
def test_attention_residual(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    check("attention_residual", residual_operands(tokens, hidden, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), ROWS)
def test_layer_output(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    check("layer_output", output_operands(tokens, hidden, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 2112), (1, 8), (37, 192)])
def test_gelu_product(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check("gelu_product", [tensor(dtype, *shape, scale=3.0), tensor(dtype, *shape)])


def test_a_row_is_computed_alone_as_among_others() -> None:
    dtype = DTYPES[-1]
    operands = output_operands(7, 352, dtype)
    together = layer.layer_output(*operands)
    alone = layer.layer_output(*(o[3:4].contiguous() for o in operands[:3]), *operands[3:])
    assert [bits(part[0]) for part in alone] == [bits(part[3]) for part in together]


def test_a_row_that_is_not_finite_stays_alone() -> None:
    operands = residual_operands(4, 96, DTYPES[-1])
    operands[1][2, 5] = float("nan")
    for part in layer.attention_residual(*operands):
        assert torch.isfinite(part).all(dim=1).tolist() == [True, True, False, True]


def test_bad_input() -> None:
    dtype = DTYPES[-1]
    hidden, attended, *rest = residual_operands(4, 96, dtype)
    with pytest.raises(ValueError, match=r"^attended: got .*wants"):
        layer.attention_residual(hidden, attended[:, :-1], *rest)
    query, key, *others = head_operands(3, 4, 2, 32, dtype, True)
    with pytest.raises(ValueError, match=r"^key: got .*wants"):
        layer.normalise_heads(query, key[..., :-2], *others)
    with pytest.raises(ValueError, match=r"^up: got .*wants"):
        layer.gelu_product(hidden, attended.double())
    residual, dense, sparse, *weights = output_operands(4, 96, dtype)
    with pytest.raises(ValueError, match=r"^sparse: got .*wants"):
        layer.layer_output(residual, dense, sparse[:3], *weights)


def test_opcheck() -> None:
    dtype = DTYPES[-1]
    operators = torch.ops.dgemma
    library.opcheck(operators.normalise_heads.default, tuple(head_operands(3, 4, 2, 32, dtype, False)))
    library.opcheck(operators.attention_residual.default, tuple(residual_operands(3, 64, dtype)))
    library.opcheck(operators.layer_output.default, tuple(output_operands(3, 64, dtype)))
    library.opcheck(operators.gelu_product.default, (tensor(dtype, 3, 64), tensor(dtype, 3, 64)))
