"""The dense projection in float64, and in torch's low precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional


def dense(input: Tensor, weight: Tensor) -> np.ndarray[Any, Any]:
    """input . weight^T [rows, out_features] in float64, nothing rounded."""
    product: np.ndarray[Any, Any] = input.double().numpy() @ weight.double().numpy().T
    return product


def dense_rounded(input: Tensor, weight: Tensor) -> Tensor:
    """What torch makes of it in the tensors' dtype."""
    return functional.linear(input, weight)
