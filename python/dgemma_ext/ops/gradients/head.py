"""The vocabulary head's cross-entropy, without the logits of all rows at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Rows whose logits exist at once: 64 x 262,144 in float32 are 67 MB.
ROWS_AT_ONCE = 64


def head_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor, row_weights: Tensor, softcap: float) -> Tensor:
    """The sum over rows of row_weights * cross-entropy(softcap * tanh(hidden @ table.T / softcap), targets).

    The product is rounded to the dtype of `hidden` before the cap, as transformers does; cap and softmax are float32
    (float64 for float64). The gradient of `hidden` is made in the forward, while a piece of the logits is at hand::

        z = c tanh(a / c)      dz = w (softmax(z) - onehot)      da = dz (1 - (z / c)^2)      dhidden = da @ table

    Rows with weight 0 are left out of the products.

    Args:
        hidden: [rows, hidden_size], the normalised output of the last layer.
        table: [vocabulary, hidden_size], dtype of hidden; it gets no gradient.
        targets: [rows], integers in [0, vocabulary).
        row_weights: [rows], float32 (float64 for float64).

    Returns:
        A float32 (or float64) scalar.
    """
    found: Tensor = _HeadCrossEntropy.apply(hidden, table, targets, row_weights, softcap)  # type: ignore[no-untyped-call]
    return found


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, row_weights: Tensor, softcap: float
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        counted = row_weights.nonzero()[:, 0]
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.zeros_like(hidden) if needs_grad else None
        for rows in counted.split(ROWS_AT_ONCE):
            raw = functional.linear(hidden[rows], table)
            capped = torch.tanh(raw.to(wide) / softcap)
            logits = capped * softcap
            weights, target = row_weights[rows].to(wide), targets[rows][:, None].long()
            log_sum = logits.logsumexp(-1)
            loss = loss + (weights * (log_sum - logits.gather(1, target)[:, 0])).sum()
            if grad is not None:
                gradient = logits.sub_(log_sum[:, None]).exp_()
                gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
                gradient.mul_(weights[:, None]).mul_(capped.square_().neg_().add_(1))
                grad[rows] = gradient.to(hidden.dtype) @ table
        if grad is not None:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad.to(loss_grad.dtype) * loss_grad).to(grad.dtype), None, None, None, None
