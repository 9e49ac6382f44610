"""The operators of `grouped_gemm` in torch's operators: a GPU's form in a build without kernels, and for float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dgemma_ext.ops.plain.registration import register_on_gpu


def moe_ffn(input: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `dgemma_ext.ops.grouped_gemm.moe_ffn`, one expert that is hit after another.

    An expert's weights are widened to float32 for its products: torch's bfloat16 products round each result, and after
    three such roundings the output is too far off.
    """
    experts, hidden_size, expert_size = down.shape
    tokens, top_k = expert_ids.shape
    hit = hit_experts(expert_ids, experts)
    # Kept by slot, so that the sum over slots has one order whichever experts they are.
    products = torch.zeros((tokens, top_k, hidden_size), dtype=torch.float32, device=input.device)
    for expert in hit:
        token, slot = torch.where(expert_ids == expert)
        gate, up = F.linear(input[token].float(), gate_up[expert].float()).split(expert_size, dim=-1)
        h = (F.gelu(gate, approximate="tanh") * up).to(input.dtype)
        products[token, slot] = F.linear(h.float(), down[expert].float())
    weights = torch.where(expert_ids >= 0, expert_weights, 0.0)
    total = torch.zeros((tokens, hidden_size), dtype=torch.float32, device=input.device)
    for k in range(top_k):
        total += weights[:, k, None] * products[:, k]
    return total.to(input.dtype)


def moe_ffn_out(
    input: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    out: Tensor,
    workspace: Tensor | None = None,
) -> None:
    """`moe_ffn` into `out`; the workspace is not used."""
    out.copy_(moe_ffn(input, expert_ids, expert_weights, gate_up, down))


def hit_experts(expert_ids: Tensor, experts: int) -> list[int]:
    """The experts that some token goes to, in order. Raises ValueError for an id that is none."""
    found: list[int] = torch.unique(expert_ids).tolist()
    for expert in found:
        if not -1 <= expert < experts:
            raise ValueError(f"dgemma::moe_ffn: expert_ids: got {expert}, wants -1 or 0 to {experts - 1}")
    return [expert for expert in found if expert >= 0]


register_on_gpu("dgemma::moe_ffn", moe_ffn)
register_on_gpu("dgemma::moe_ffn.out", moe_ffn_out)
# torch's own product is what it replaces; it has other bits for other numbers of rows.
register_on_gpu("dgemma::dense", F.linear)
