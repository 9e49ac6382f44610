"""The experts with low-rank factors beside their weights.

The fused operators have no place for them between their products, so each expert's two products are made by
themselves, by operators whose bits for a token do not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma_ext.checkpoint import Weight
from dgemma_ext.model.low_rank import LowRank, LowRanks
from dgemma_ext.ops import grouped_gemm, quantized_gemm
from dgemma_ext.ops.layer import gelu_product

GATE_UP, DOWN = "experts_gate_up", "experts_down"

# Tokens at a time: what is kept for each slot of a token takes 90 kB at the published sizes.
_TOKENS = 512


def adapts_experts(factors: LowRanks) -> bool:
    return GATE_UP in factors or DOWN in factors


def adapted_experts(
    input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Weight, down: Weight, factors: LowRanks
) -> Tensor:
    """`ops.weights.experts` with factors beside both weights, [experts, rank, in] and [experts, out, rank] each, or
    beside one of them. Gate and up are rounded to the dtype of input, as in transformers.
    """
    parts = [
        _of_tokens(*part, gate_up, down, factors.get(GATE_UP), factors.get(DOWN))
        for part in zip(input.split(_TOKENS), expert_ids.split(_TOKENS), expert_weights.split(_TOKENS), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _of_tokens(
    input: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Weight,
    down: Weight,
    gate_up_factors: LowRank | None,
    down_factors: LowRank | None,
) -> Tensor:
    # Kept by slot, so that the sum over slots has one order whichever experts they are.
    outputs = input.new_zeros((*expert_ids.shape, input.shape[1]), dtype=torch.float32)
    for expert in expert_ids.unique().tolist():
        if expert < 0:
            continue
        token, slot = torch.where(expert_ids == expert)
        gate, up = _product(input[token], gate_up, gate_up_factors, expert).chunk(2, dim=-1)
        hidden = gelu_product(gate.contiguous(), up.contiguous())
        outputs[token, slot] = _product(hidden, down, down_factors, expert).float()
    total = torch.zeros_like(input, dtype=torch.float32)
    for k in range(expert_ids.shape[1]):
        total += expert_weights[:, k, None] * outputs[:, k]  # a slot to skip has zeros
    return total.to(input.dtype)


def _product(x: Tensor, weight: Weight, factors: LowRank | None, expert: int) -> Tensor:
    if isinstance(weight, Tensor):
        y = grouped_gemm.dense(x, weight[expert])
    else:
        y = quantized_gemm.dense(x, weight.expert(expert))
    if factors is None:
        return y
    return LowRank(factors.a[expert], factors.b[expert]).add_by(grouped_gemm.dense, y, x)
