"""The operators route and dense on every backend, through Python; their kernels have their own tests as well."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library
from torch.nn import functional

from backend import BACKEND, DTYPES
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


needs_cpu = pytest.mark.skipif(BACKEND != "cpu", reason="a GPU's sums have an order of their own")
# tokens, hidden, experts, top_k: no token, the model's sizes, all experts, sums of every kind of torch's
SAME_BITS = [
    *((0, 64, 4, 2), (1, 2816, 128, 8), (7, 2816, 128, 8), (256, 2816, 128, 8), (256, 96, 5, 1), (7, 72, 12, 12)),
    *((256, 40, 8, 3), (7, 130, 8, 4), (256, 264, 9, 7), (7, 64, 64, 13), (1, 64, 128, 128), (300, 64, 700, 700)),
]


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Ids and weights, bit for bit; NaN has many bits."""
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1].isnan(), wanted[1].isnan())
    assert bits(found[1].nan_to_num(-1.0)) == bits(wanted[1].nan_to_num(-1.0))


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "experts", "top_k"), SAME_BITS)
def test_the_cpus_router_has_the_bits_of_torchs_operators(
    tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype
) -> None:
    input, *operands = routed(tokens, hidden, experts, dtype)
    for spoilt in (False, True):
        if spoilt:
            input[tokens // 2 :, 3] = (
                torch.tensor([float("nan"), float("inf"), -float("inf")])
                .repeat(tokens)[: tokens - tokens // 2]
                .to(dtype)
            )
            input[: tokens // 3] = 0.0
        assert_same(router.route(input, *operands, top_k, 1e-6), router_plain.route(input, *operands, top_k, 1e-6))
        scaled = router.router_input(input, operands[0], 1e-6)
        wanted = router_plain.scaled_input(input, operands[0], 1e-6)
        assert torch.equal(scaled.isnan(), wanted.isnan())
        assert bits(scaled.nan_to_num(-1.0)) == bits(wanted.nan_to_num(-1.0))


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 40])
def test_a_choice_among_ties_nan_and_zeros_is_torchs_sort(top_k: int, dtype: torch.dtype) -> None:
    """Probabilities of a few values, NaN here and there and alone, zeros of both signs."""
    few = torch.tensor([0.0, -0.0, 1e-40, 0.125, 0.3, 0.3000001, 1.0, float("nan"), float("inf")])
    scale = (torch.rand(40) + 0.5).to(dtype)
    for values in (few, few[:-2], few[2:6], few[3:4], few[-2:-1], torch.rand(1000)):
        found = values[torch.randint(len(values), (300, 40))]
        assert_same(router.router_choice(found, scale, top_k), router_plain.choice(found, scale, top_k))


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_tie_go_to_the_lower_expert(dtype: torch.dtype) -> None:
    input, scale, projection, per_expert = routed(50, 96, 12, dtype)
    projection[3::2] = projection[1]  # so that six tie
    operands = (input, scale, projection, per_expert)
    ids, _ = router.route(*operands, 12, 1e-6)
    assert all([id for id in row if id % 2] == [1, 3, 5, 7, 9, 11] for row in ids.tolist())
    assert_same(router.route(*operands, 12, 1e-6), router_plain.route(*operands, 12, 1e-6))
    scores = functional.linear(router_plain.scaled_input(input, scale, 1e-6), projection)
    assert_same(router.choose(scores, per_expert, 5), router_plain.choose(scores, per_expert, 5))


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
    library.opcheck(torch.ops.dgemma.router_input.default, (input, operands[0], 1e-6))
    library.opcheck(torch.ops.dgemma.router_choice.default, (torch.rand(3, 4), operands[2], 2))
    library.opcheck(torch.ops.dgemma.dense.default, (input, torch.randn(8, 64).to(DTYPES[-1])))
