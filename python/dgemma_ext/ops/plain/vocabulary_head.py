"""The vocabulary head in torch's operators: the CPU's form of `ops.vocabulary_head`, and a GPU's without kernels.

The CPU keeps it though the C interface has a kernel for it: the product is oneDNN's, and the raw logits, on which ties
and stopping depend, have the bits of transformers'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgemma_ext.ops.plain.registration import register

_STATISTICS = ("argmax", "entropy", "row_max", "row_sum", "tile_max", "tile_sum")


def vocabulary_head(hidden: Tensor, embedding: Tensor, *operands: Any) -> None:
    """torch's product, request by request so that a batch changes no bits, and the statistics of what it stored."""
    softcap, temperature, active, allowed, allowed_row, logits, *statistics = operands
    for request in range(hidden.shape[0]):
        if active is None or bool(active[request]):
            torch.mm(hidden[request], embedding.t(), out=logits[request])
    torch.ops.dgemma.vocabulary_statistics.out(
        *(logits, softcap, temperature, active, allowed, allowed_row),
        **dict(zip(_STATISTICS, statistics, strict=True)),
    )


register("dgemma::vocabulary_head", vocabulary_head)
