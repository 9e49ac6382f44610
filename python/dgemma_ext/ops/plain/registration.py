"""Makes a form in torch's operators the kernel of an operator, behind the checks of the operator's description."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from dgemma_ext import environment
from dgemma_ext.ops import description

# Layouts of an operator's calls; a conversation has one more for every prompt's length.
_REMEMBERED = 1024


def register_on_gpu(name: str, function: Callable[..., Any]) -> None:
    """Makes `function` the GPU's form of an operator ("dgemma::sample.out"), unless a kernel is there and wanted."""
    if not _has_kernel(name, "CUDA") or environment.plain_kernels():
        library.impl(name, "CUDA", _checked(name, function))


def register(name: str, function: Callable[..., Any]) -> None:
    """Makes `function` the form of an operator on the CPU, where no kernel is of its own, and as above on a GPU."""
    if not _has_kernel(name, "CPU"):
        library.impl(name, "CPU", _checked(name, function))
    register_on_gpu(name, function)


def register_with_out(name: str, out_form: Callable[..., None]) -> Callable[..., Any]:
    """Makes `out_form`, which writes into given outputs, the GPU's `name.out`, and with outputs of its own `name`.

    Returns the latter. Its outputs are zero where nothing is written.
    """
    names = [argument.name for argument in description.OPERATORS[name].arguments]

    def new_form(*arguments: Any, **keywords: Any) -> Any:
        arguments = (*arguments, *(keywords.get(argument) for argument in names[len(arguments) :]))
        outputs = description.new_outputs(name, description.check(name, arguments, {}), zeroed=True)
        out_form(*arguments, **outputs)
        made = tuple(outputs.values())
        return made[0] if len(made) == 1 else made

    register_on_gpu(f"dgemma::{name}.out", out_form)
    register_on_gpu(f"dgemma::{name}", new_form)
    return new_form


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The form behind the checks, which look at layouts alone: those that passed once pass again in a fifth of the time
    (20 microseconds, which a small model would feel)."""
    described = name.removeprefix("dgemma::").removesuffix(".out")
    passed: set[tuple[Any, ...]] = set()

    def call(*arguments: Any, **keywords: Any) -> Any:
        layouts = tuple(_layout(value) for value in (*arguments, *keywords.values()))
        if layouts not in passed:
            description.check(described, arguments, keywords)
            if len(passed) >= _REMEMBERED:
                passed.clear()
            passed.add(layouts)
        return function(*arguments, **keywords)

    return call


def _layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.device, value.is_contiguous()
    return value


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
