"""The operators, one module per kernel family. Importing this registers `torch.ops.dgemma`.

Imports run one way: description (what the C++ side says of every operator), formats of weights, operators (how one is
called); plain, the forms in torch's operators; a module for each family; weights, which chooses among them.
"""

from __future__ import annotations

import torch

import dgemma_ext._C as _C
from dgemma_ext.ops import (
    block_attention,
    denoise,
    description,
    grouped_gemm,
    layer,
    plain,
    quantize,
    quantized_gemm,
    router,
    vocabulary_head,
    weights,
)
