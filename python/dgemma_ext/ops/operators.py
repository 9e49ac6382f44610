"""How the functions of this package call their operators: looked up once, with a refusal as a ValueError."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

import dgemma_ext._C  # noqa: F401  registers the operators

# What an operator refuses begins so, and nothing else does: a call that failed is "dgemma::name failed: ...".
_REFUSAL = re.compile(r"dgemma::\w+: (.*)")


def operator(name: str) -> Callable[..., Any]:
    """The operator torch.ops.dgemma.<name> ("sample", "sample.out").

    It raises ValueError for arguments that it refuses; torch before 2.13 makes a RuntimeError of that. An error that
    CUDA tells stays a RuntimeError with the operator's name.
    """
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.dgemma, packet), overload or "default")

    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return found(*arguments, **keywords)
        except (ValueError, RuntimeError) as error:
            refused = _REFUSAL.search(str(error))
            if refused is None:
                raise
            raise ValueError(refused[1]) from error

    return call
