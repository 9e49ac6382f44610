"""The operators, one module per kernel family. Importing this registers `torch.ops.dgemma`."""

from __future__ import annotations

import torch  # noqa: F401  the extension module needs torch's libraries loaded

from dgemma_ext import _C  # noqa: F401  registers the schemas and the CPU kernels
from dgemma_ext.ops import block_attention, denoise, grouped_gemm, layer, quantized_gemm, router, vocabulary_head

__all__ = ["block_attention", "denoise", "grouped_gemm", "layer", "quantized_gemm", "router", "vocabulary_head"]
