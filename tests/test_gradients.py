"""Operators with gradients: every backward formula against finite differences in float64, and what is trained on, in
float32 and bfloat16, against float64 by the bounds of bounds.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from bounds import assert_close
from dgemma_ext.ops.formats import FORMATS, QuantizedWeight
from dgemma_ext.ops.gradients import (
    ExpertFactors,
    canvas_attention,
    causal_attention,
    grouped_products,
    head_cross_entropy,
    linear,
    moe_ffn,
)

HIDDEN, EXPERTS, TOP_K = 32, 5, 2
# INT8 rounds what it multiplies too, and dgemma finetune refuses it.
FORMATS_WITH_GRADIENTS = ["fp8", "int4", "nvfp4"]


def leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype).requires_grad_()


# Experts --------------------------------------------------------------------------------------------------------------


def expert_case(
    tokens: int, rank: int, dtype: torch.dtype = torch.float64, hidden: int = HIDDEN, size: int = HIDDEN
) -> dict[str, Any]:
    """Operands of `moe_ffn`. Expert 3 has no token, and expert 0 one of every token. What the factors add to a weight
    is a tenth of it."""
    ids = torch.stack([torch.zeros(tokens), torch.tensor([1, 2, 4, 2])[torch.arange(tokens) % 4]], 1).int()
    weights = torch.rand(tokens, TOP_K, dtype=torch.float64)
    shapes = ((rank, hidden), (2 * size, rank), (rank, size), (hidden, rank))
    return {
        "x": leaf(tokens, hidden, dtype=dtype),
        "ids": ids,
        "weights": weights.to(torch.promote_types(dtype, torch.float32)).requires_grad_(),
        "gate_up": leaf(EXPERTS, 2 * size, hidden, scale=hidden**-0.5, dtype=dtype).detach(),
        "down": leaf(EXPERTS, hidden, size, scale=size**-0.5, dtype=dtype).detach(),
        "factors": [leaf(EXPERTS, *shape, scale=0.1, dtype=dtype) for shape in shapes],
    }


def run_experts(case: dict[str, Any], x: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
    both = [None, None]
    if factors:
        a1, b1, a2, b2 = factors
        both = [ExpertFactors(a1, b1, 0.7), ExpertFactors(a2, b2, 1.3)]
    return moe_ffn(x, case["ids"], weights, case["gate_up"], case["down"], *both)


def plain_experts(case: dict[str, Any], x: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
    """The same sums with autograd's own backward, weight by weight."""
    gate_up, down = case["gate_up"], case["down"]
    if factors:
        a1, b1, a2, b2 = factors
        gate_up, down = gate_up + 0.7 * b1 @ a1, down + 1.3 * b2 @ a2
    rows = []
    for token, (ids, own) in enumerate(zip(case["ids"].tolist(), weights, strict=True)):
        total = torch.zeros_like(x[token])
        for expert, weight in zip(ids, own, strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            total = total + weight.to(x.dtype) * (down[expert] @ (functional.gelu(gate, approximate="tanh") * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("rank", [0, 3])
def test_experts_backward_is_the_derivative(rank: int) -> None:
    case = expert_case(tokens=4, rank=max(rank, 1), hidden=6, size=3)
    leaves = [case["x"], case["weights"], *(case["factors"] if rank else ())]
    assert gradcheck(lambda *given: run_experts(case, *given), leaves, fast_mode=False)


def with_grads(function: Callable[..., Tensor], leaves: list[Tensor], output_grad: Tensor) -> list[Tensor]:
    for one in leaves:
        one.grad = None
    out = function(*leaves)
    out.backward(output_grad.to(out.dtype))
    return [out.detach(), *(one.grad for one in leaves if one.grad is not None)]


def in_float64(leaves: list[Tensor]) -> list[Tensor]:
    return [one.detach().double().requires_grad_() for one in leaves]


def assert_all_close(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    leaves: list[Tensor],
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    """Output and gradients of `ours` in a dtype against `plain` in float64; `plain` in the dtype gives the bound."""
    output_grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    exact, low, got = (
        with_grads(function, given, output_grad)
        for function, given in ((plain, in_float64(leaves)), (plain, leaves), (ours, leaves))
    )
    assert len(got) == len(exact) == len(leaves) + 1
    for mine, wanted, rough in zip(got, exact, low, strict=True):
        assert_close(mine, wanted, dtype, rough, chained=True)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_by_kernel(dtype: torch.dtype, rank: int) -> None:
    """Against float64, and through the kernel where there are no factors."""
    case = expert_case(tokens=23, rank=max(rank, 1), dtype=dtype)
    leaves = [case["x"], case["weights"], *(case["factors"] if rank else ())]

    def plain(x: Tensor, *others: Tensor) -> Tensor:
        wide = case | {name: case[name].to(x.dtype) for name in ("gate_up", "down")}
        return plain_experts(wide, x, *others)

    assert_all_close(lambda *given: run_experts(case, *given), plain, leaves, dtype, (23, HIDDEN))


@pytest.mark.parametrize("format", FORMATS_WITH_GRADIENTS)
def test_experts_over_quantized_weights(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are those of the dequantized weights, which exist a few experts at a time."""
    monkeypatch.setattr(grouped_products, "EXPERTS_AT_ONCE", 2)
    case = expert_case(tokens=11, rank=4, dtype=torch.float32)
    quantized = case | {name: quantized_of(case[name], format, runs) for name, runs in (("gate_up", 2), ("down", 1))}
    plain = case | {name: quantized[name].dequantized(torch.float32) for name in ("gate_up", "down")}
    leaves = [case["x"], case["weights"], *case["factors"]]
    output_grad = torch.randn(11, HIDDEN)
    for chosen in (leaves, leaves[:2]):
        got = with_grads(lambda *given: run_experts(quantized, *given), chosen, output_grad)
        wanted = with_grads(lambda *given: run_experts(plain, *given), chosen, output_grad)
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def quantized_of(weight: Tensor, format: str, runs: int = 1) -> QuantizedWeight:
    form = FORMATS[format]
    options: dict[str, Any] = {"int4": {"group": HIDDEN}, "nvfp4": {"runs": runs}}.get(format, {})
    made: QuantizedWeight = form.weight.quantize(weight, **options)  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_and_the_loop_over_experts_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    rows, weight = torch.randn(9, 16).to(dtype), torch.randn(4, 24, 16).to(dtype)
    grads = torch.randn(9, 24).to(dtype)
    found = []
    for takes in (True, False):
        monkeypatch.setattr(grouped_products, "_grouped_mm_takes", lambda *_, takes=takes: takes)
        found.append(
            (grouped_products.product(rows, weight, ends), grouped_products.transposed_product(grads, weight, ends))
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# Dense ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS_WITH_GRADIENTS)
def test_dense_over_quantized_weights(format: str) -> None:
    weight = quantized_of(torch.randn(24, HIDDEN), format)
    assert gradcheck(lambda x: linear(x, weight), [leaf(2, 3, HIDDEN)])
    leaves = [leaf(7, HIDDEN, dtype=torch.float32)]
    plain = functools.partial(dequantized_product, weight)
    assert_all_close(lambda x: linear(x, weight), plain, leaves, torch.float32, (7, 24))


def dequantized_product(weight: QuantizedWeight, x: Tensor) -> Tensor:
    return x @ weight.dequantized(x.dtype).T


# Attention ------------------------------------------------------------------------------------------------------------

HEADS, KEY_HEADS, HEAD_DIM, BLOCK, CAPACITY = 4, 2, 16, 5, 9


def attention_leaves(dtype: torch.dtype) -> list[Tensor]:
    return [
        leaf(2, BLOCK, HEADS, HEAD_DIM, dtype=dtype),
        *(leaf(2, BLOCK, KEY_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2)),
        *(leaf(2, CAPACITY, KEY_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2)),
    ]


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, causal: bool, window: int
) -> Tensor:
    """Request 0 has a prefix of 9 positions in slot 1, request 1 of 4 in slot 0."""
    rows = []
    for request, (slot, prefix) in enumerate(((1, 9), (0, 4))):
        keys = torch.cat([prefix_key[slot, :prefix], key[request]]).repeat_interleave(HEADS // KEY_HEADS, 1)
        values = torch.cat([prefix_value[slot, :prefix], value[request]]).repeat_interleave(HEADS // KEY_HEADS, 1)
        scores = torch.einsum("qhd,khd->hqk", query[request], keys) * 0.3
        place, new = torch.arange(prefix + BLOCK), prefix + torch.arange(BLOCK)[:, None]
        if causal:
            seen = (place <= new) & ((place > new - window) if window else True)
        else:
            seen = ((place > prefix - window) if window else (place >= 0)).expand(BLOCK, -1)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        rows.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool, window: int) -> None:
    """Gradients of queries, keys, values and of the prefix, whose rows beyond its length may hold NaN."""
    form = causal_attention if causal else canvas_attention
    slot, prefix = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([9, 4], dtype=torch.int32)

    def ours(*given: Tensor) -> Tensor:
        return form(*given, slot, prefix, window=window, scale=0.3)

    def plain(*given: Tensor) -> Tensor:
        return plain_attention(*given, causal=causal, window=window)

    assert gradcheck(ours, attention_leaves(torch.float64), fast_mode=True)
    for dtype in (torch.float32, torch.bfloat16):
        leaves = attention_leaves(dtype)
        for cached in leaves[3:]:
            cached.data[0, 4:] = float("nan")
        assert_all_close(ours, plain, leaves, dtype, (2, BLOCK, HEADS, HEAD_DIM))


# Head -----------------------------------------------------------------------------------------------------------------


def plain_head(hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = torch.tanh((hidden @ table.T).to(weights.dtype) / 5.0) * 5.0
    return (weights * functional.cross_entropy(logits, targets, reduction="none")).sum()


def test_head_cross_entropy() -> None:
    """A vocabulary and a number of rows that no piece divides, rows that do not count, and a gradient other than 1."""
    table, targets, weights = torch.randn(517, 8).double(), torch.randint(517, (131,)), torch.rand(131).double()
    weights[::3] = 0
    few = slice(0, 5)
    given = (table, targets[few], weights[few])
    assert gradcheck(lambda hidden: 3 * head_cross_entropy(hidden, *given, 5.0), [leaf(5, 8)], fast_mode=False)
    for dtype in (torch.float32, torch.bfloat16):
        hidden = leaf(131, 8, dtype=dtype)
        rounded = table.to(dtype)

        def ours(x: Tensor, rounded: Tensor = rounded) -> Tensor:
            return 3 * head_cross_entropy(x, rounded, targets, weights.float(), 5.0)

        def plain(x: Tensor, rounded: Tensor = rounded) -> Tensor:
            own = weights.to(torch.promote_types(x.dtype, torch.float32))
            return 3 * plain_head(x, rounded.to(x.dtype), targets, own)

        assert_all_close(ours, plain, [hidden], dtype, ())
        assert torch.equal(ours(hidden).detach(), ours(hidden.detach()))
