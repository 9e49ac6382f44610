"""Forms of the operators in torch's own operators, a module for each family: fallbacks that need no kernel.

Who needs them, and why each is still there:

- block_attention, denoise, grouped_gemm and quantized_gemm: a GPU in a build without CUDA kernels (no nvcc at hand), a
  GPU asked for float32, which no kernel takes, and whoever asks whether a kernel is at fault. DGEMMA_KERNELS=plain in
  the environment of the process chooses them in every build. Tests take them for a second opinion.
- layer, router, vocabulary_head, and moe_ffn_fp8 of quantized_gemm: the same, and the CPU runs them, or what a kernel
  leaves to torch; each module says why.
- quantize: a GPU, which has no kernel for it.

Importing this registers them all (registration.py).
"""

from __future__ import annotations

from dgemma_ext.ops.plain import (
    block_attention,
    denoise,
    grouped_gemm,
    layer,
    quantize,
    quantized_gemm,
    router,
    vocabulary_head,
)
