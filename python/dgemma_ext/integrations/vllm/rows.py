"""The part `rows`: the norms of a DiffusionGemma's layers on a CPU, by the kernel of `rms_norm`.

vLLM has an operator rms_norm with a list of implementations by name, of which a model's configuration says which come
first (`--ir-op-priority`). This adds one and puts it in front for DiffusionGemma alone, where the user has not said
otherwise. It rounds as transformers does, once; vLLM's own for a CPU rounds before it multiplies by the weight too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgemma_ext.integrations.vllm import configuration
from dgemma_ext.ops.layer import row_norm

NAME = "dgemma"  # of the implementation
DTYPES = (torch.float32, torch.bfloat16)


def register() -> None:
    """Adds the implementation, and the preference for it."""
    import vllm.kernels  # noqa: F401  vLLM's own come first, or it would warn of them
    from vllm import ir
    from vllm.platforms import current_platform

    if NAME not in ir.ops.rms_norm.impls:
        add = ir.ops.rms_norm.register_impl(NAME, supports_args=serves, supported=current_platform.is_cpu())
        add(rms_norm)
    configuration.add(prefer)


def prefer(vllm_config: Any) -> None:
    """Puts the implementation in front. vLLM appends the platform's own, which serve what this does not."""
    from vllm.platforms import current_platform

    priority = vllm_config.kernel_config.ir_op_priority
    if current_platform.is_cpu() and not priority.rms_norm:
        priority.rms_norm = [NAME]


def serves(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """Whether the kernel computes a norm: of whole rows, in fp32 or bf16, with a weight of the same dtype or none."""
    same = weight is None or weight.dtype == x.dtype
    return same and variance_size is None and x.dtype in DTYPES and x.device.type == "cpu"


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """vLLM's operator: x [..., width], weight [width]."""
    return row_norm(x.reshape(-1, x.shape[-1]).contiguous(), weight, epsilon).view(x.shape)
