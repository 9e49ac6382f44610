"""How the functions of this package call their operators: looked up once, with a refusal as a ValueError and memory
that is not there as a torch.OutOfMemoryError."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dgemma_ext._C  # noqa: F401  registers the operators
from dgemma_ext.units import format_bytes

# What an operator refuses begins so, and nothing else does: a call that failed is "dgemma::name failed: ...".
_REFUSAL = re.compile(r"dgemma::\w+: (.*)")
# csrc/torch/operands.cpp:new_tensor
_NO_MEMORY = re.compile(r"dgemma::(\w+) failed: no memory of (\d+) bytes for (\w+): ")


def operator(name: str) -> Callable[..., Any]:
    """The operator torch.ops.dgemma.<name> ("sample", "sample.out").

    It raises ValueError for arguments that it refuses; torch before 2.13 makes a RuntimeError of that. An error that
    CUDA tells stays a RuntimeError with the operator's name. Where an output or a workspace does not fit it raises
    torch.OutOfMemoryError, which says how much was wanted and how much was free.
    """
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.dgemma, packet), overload or "default")

    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return found(*arguments, **keywords)
        except (ValueError, RuntimeError) as error:
            refused, no_memory = _REFUSAL.search(str(error)), _NO_MEMORY.search(str(error))
            if refused is not None:
                raise ValueError(refused[1]) from error
            if no_memory is not None:
                operands = (*arguments, *keywords.values())
                raise _out_of_memory(no_memory, next(o.device for o in operands if isinstance(o, Tensor))) from error
            raise

    return call


def _out_of_memory(told: re.Match[str], device: torch.device) -> torch.OutOfMemoryError:
    """Raises what CUDA says where the GPU has failed, which is what allocations tell after a kernel that did."""
    operator, wanted, name = told.groups()
    message = f"dgemma::{operator}: {name} takes {format_bytes(int(wanted))}"
    if device.type != "cuda":
        return torch.OutOfMemoryError(f"{message}, which {device} cannot allocate")
    free, total = torch.cuda.mem_get_info(device)
    reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return torch.OutOfMemoryError(
        f"{message}; {device} has {format_bytes(free)} of {format_bytes(total)} free, and torch holds "
        f"{format_bytes(reserved)}, of which tensors use {format_bytes(used)}"
    )
