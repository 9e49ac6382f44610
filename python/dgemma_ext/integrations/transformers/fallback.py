"""The state of an accelerated model: its implementations before, and the warnings that it has given."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import dgemma_ext._C as _C


class AccelerationWarning(UserWarning):
    """A part of an accelerated model runs on transformers' own code."""


@dataclass
class Acceleration:
    """The state of one model, which its attention and expert modules share.

    attention, experts: sub-configuration → the implementation that it named before.
    """

    attention: dict[str, str | None] = field(default_factory=dict)
    experts: dict[str, str | None] = field(default_factory=dict)
    _given: set[tuple[str, str]] = field(default_factory=set)

    def fall_back(self, part: str, reason: str) -> None:
        """Warns that `part` runs on transformers' own code, once for each reason."""
        if (part, reason) not in self._given:
            self._given.add((part, reason))
            warnings.warn(
                f"the {part} of this model runs on transformers' own code: {reason}", AccelerationWarning, stacklevel=2
            )


# The state of modules that use the implementation without `accelerate`, by from_pretrained(attn_implementation=...).
_DEFAULT = Acceleration()


def acceleration_of(module: nn.Module) -> Acceleration:
    state: Any = module.__dict__.get("_dgemma_acceleration")
    return _DEFAULT if state is None else state


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether a gradient of one of these tensors will be asked for."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def tensors_refused(*tensors: Tensor) -> str | None:
    """The reason that no kernel takes these tensors, or None."""
    first = tensors[0]
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"the kernels take plain tensors, and one is a {type(tensor).__name__}"
    if any(tensor.dtype != first.dtype for tensor in tensors):
        return f"dtypes are mixed ({', '.join(sorted({str(tensor.dtype) for tensor in tensors}))})"
    if any(tensor.device != first.device for tensor in tensors):
        return f"devices are mixed ({', '.join(sorted({str(tensor.device) for tensor in tensors}))})"
    if first.device.type not in ("cpu", "cuda"):
        return f"no kernel is for {first.device.type}"
    takes = (torch.bfloat16,) if first.is_cuda and _C.has_cuda() else (torch.bfloat16, torch.float32)
    if first.dtype not in takes:
        return f"no kernel of {first.device.type} takes {first.dtype}"
    return None
