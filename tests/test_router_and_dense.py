"""The operators route and dense on every backend, through Python; their kernels have their own tests as well."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library
from torch.nn import functional

from backend import DTYPES
from bounds import assert_close
from denoise_cases import bits
from dgemma_ext.ops import grouped_gemm, router
from dgemma_ext.ops.plain import router as router_plain

# tokens, hidden, experts, top_k
ROUTES = [(1, 64, 4, 2), (37, 96, 4, 2), (20, 352, 16, 8), (5, 64, 128, 8)]


def routed(tokens: int, hidden: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    projection = torch.randn(experts, hidden) * 0.3
    operands = (torch.randn(tokens, hidden) * 3, torch.rand(hidden) + 0.5, projection, torch.rand(experts) + 0.5)
    return tuple(operand.to(dtype) for operand in operands)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "experts", "top_k"), ROUTES)
def test_route(tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    input, scale, projection, per_expert = routed(tokens, hidden, experts, dtype)
    ids, weights = router.route(input, scale, projection, per_expert, top_k, 1e-6)
    found = router_plain.probabilities(input, scale, projection, 1e-6)
    assert ids.dtype == torch.int32
    assert tuple(ids.shape) == (tokens, top_k)
    # A score may round to its neighbour where sums have another order; another choice is then as good.
    chosen, best = found.gather(1, ids.long()), found.topk(top_k).values
    step = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}[dtype]
    assert bool((best - chosen <= step * best).all())
    assert all(len(set(row)) == top_k for row in ids.tolist())
    wanted = router_plain.weights_of(found, ids.long(), per_expert)
    assert bool(((weights - wanted).abs() <= 2 * step * wanted.abs()).all())


def test_a_token_is_routed_alone_as_among_others() -> None:
    input, *operands = routed(19, 96, 8, DTYPES[-1])
    ids, weights = router.route(input, *operands, 3, 1e-6)
    for token in (0, 7, 18):
        one_id, one_weight = router.route(input[token : token + 1].contiguous(), *operands, 3, 1e-6)
        assert one_id[0].tolist() == ids[token].tolist()
        assert bits(one_weight[0]) == bits(weights[token])


@pytest.mark.parametrize("name", ["scale", "projection", "per_expert_scale", "top_k"])
def test_bad_route(name: str) -> None:
    input, scale, projection, per_expert = routed(3, 64, 4, DTYPES[-1])
    arguments = {"scale": scale, "projection": projection, "per_expert_scale": per_expert, "top_k": 2}
    arguments[name] = 5 if name == "top_k" else arguments[name][..., :-1]
    wrong = "per_expert_scale" if name == "projection" else name
    with pytest.raises(ValueError, match=rf"({wrong}|projection): got .*wants"):
        router.route(input, **arguments, epsilon=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "wide", "out"), [(1, 64, 40), (37, 96, 200), (130, 200, 64)])
def test_dense(rows: int, wide: int, out: int, dtype: torch.dtype) -> None:
    input, weight = torch.randn(rows, wide).to(dtype), (torch.randn(out, wide) / wide**0.5).to(dtype)
    result = grouped_gemm.dense(input, weight)
    assert_close(result, input.double() @ weight.double().T, dtype, functional.linear(input, weight))
    first = grouped_gemm.dense(input[:1].contiguous(), weight)
    assert bits(first[0]) == bits(result[0])


def test_opcheck() -> None:
    input, *operands = routed(3, 64, 4, DTYPES[-1])
    library.opcheck(torch.ops.dgemma.route.default, (input, *operands, 2, 1e-6))
    library.opcheck(torch.ops.dgemma.dense.default, (input, torch.randn(8, 64).to(DTYPES[-1])))
