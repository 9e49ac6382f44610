"""Resolves the options of `from_pretrained`: device, dtype, activations and the mode of dense products."""

from __future__ import annotations

import torch

import dgemma_ext._C as _C
from dgemma_ext import arguments
from dgemma_ext.checkpoint import ModelConfig
from dgemma_ext.model.matmul import MatmulMode
from dgemma_ext.ops.quantized_gemm import check_moe_ffn_fp8

_DEVICES = "auto, cpu or cuda"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_matmul(batch_invariant: bool, device: torch.device, dtype: torch.dtype) -> MatmulMode:
    """The mode of dense products. Raises ValueError where `batch_invariant` is not supported."""
    if device.type == "cpu":
        return MatmulMode.PER_REQUEST
    if not batch_invariant:
        return MatmulMode.BATCHED
    if dtype != torch.bfloat16:
        raise ValueError(f"batch_invariant on a GPU is for dtype bfloat16, got {dtype}")
    if not _C.has_cuda():
        raise ValueError("batch_invariant on a GPU needs a build with CUDA kernels, and this one has none")
    return MatmulMode.INVARIANT


def check_activations(activations: str | None, format: str) -> None:
    """Raises ValueError for a value other than None and "fp8", and for "fp8" with experts in another format."""
    if activations is not None and not (isinstance(activations, str) and activations == "fp8"):
        raise arguments.refusal("activations", "fp8, or None for those of the dtype", activations)
    if activations is not None and format != "fp8":
        raise ValueError(f"activations fp8 is for experts with weights in fp8, and these are in {format}")


def resolve_activations(
    activations: str | None, format: str, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> str | None:
    """The format that the experts' inputs are rounded to: None or "fp8". `format`: that of the experts' weights.

    Raises ValueError for anything else, for weights that are not fp8, and for a GPU without FP8 products.
    """
    check_activations(activations, format)
    if activations is None:
        return None
    try:
        check_moe_ffn_fp8(config.hidden_size, config.moe_intermediate_size, dtype, device)
    except ValueError as error:
        raise ValueError(f"activations fp8: {str(error).removeprefix('dgemma::moe_ffn_fp8: ')}") from error
    return activations


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to use; "auto" is a GPU where torch sees one. Raises ValueError for a device that is not there and
    for a driver older than the CUDA release of this build (13.0, from cmake/Cuda.cmake, needs driver 580)."""
    if not isinstance(device, str | torch.device):
        raise arguments.refusal("device", _DEVICES, device)
    if isinstance(device, str) and device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise arguments.refusal("device", _DEVICES, device) from error
    if resolved.type not in ("cpu", "cuda"):
        raise arguments.refusal("device", _DEVICES, device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, and torch sees no CUDA GPU here")
    if resolved.type == "cuda" and _C.has_cuda():
        major, minor = divmod(torch._C._cuda_getDriverVersion(), 1000)  # type: ignore[attr-defined]
        if major < 13:
            had = f"{major}.{minor // 10}"
            raise ValueError(f"this build needs NVIDIA driver 580 or later (CUDA 13.0); this one has CUDA {had}")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, config: ModelConfig) -> torch.dtype:
    """The dtype to use; "auto" is the checkpoint's. Raises ValueError for one that is not supported."""
    if isinstance(dtype, str):
        if dtype == "auto":
            return config.dtype
        if dtype in _DTYPES:
            return _DTYPES[dtype]
    elif isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    raise arguments.refusal("dtype", "auto, bfloat16 or float32", dtype)
