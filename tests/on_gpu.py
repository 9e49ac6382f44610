"""Runs the operators' tests on a GPU: tensors stay on the CPU, and every operator runs on the GPU with copies of them.

So the tests are the same on all backends, and their oracles need no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import library

from dgemma_ext import ops  # noqa: F401  registers torch.ops.dgemma

# The forms stay registered for as long as this object lives.
_IMPLEMENTATIONS = library.Library("dgemma", "IMPL")


def run_operators_on(device: str) -> None:
    """Registers a form of every operator for CPU tensors that copies them to the device, calls it, and copies back.

    It replaces the CPU form that some operators have in Python, which torch before 2.13 must be told to allow.
    """
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("dgemma::"):
            base, _, overload = name.removeprefix("dgemma::").partition(".")
            operator = getattr(getattr(torch.ops.dgemma, base), overload or "default")
            _IMPLEMENTATIONS.impl(name.removeprefix("dgemma::"), copying(operator, device), "CPU", allow_override=True)


def copying(operator: Any, device: str) -> Callable[..., Any]:
    """The operator on copies of its tensors; results and changed arguments are copied back."""
    written = {a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    names = [a.name for a in operator._schema.arguments]

    def call(*arguments: Any, **keywords: Any) -> Any:
        given = dict(zip(names, arguments, strict=False)) | keywords
        moved = {k: v.to(device, copy=True) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        positional = [moved[name] for name in names[: len(arguments)]]
        result = operator(*positional, **{name: moved[name] for name in keywords})
        for name in written & given.keys():
            if isinstance(given[name], torch.Tensor):
                given[name].copy_(moved[name])
        if isinstance(result, torch.Tensor):
            return result.cpu()
        return tuple(part.cpu() for part in result) if isinstance(result, tuple | list) else result

    return call
