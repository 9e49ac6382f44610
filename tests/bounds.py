"""When a result counts as right: one bound on the whole tensor, one on its worst element.

The global bound catches a wrong scale or a term left out, which a few ulps on every element would hide. The bound on
elements is not picked by hand: it is what the same maths in ordinary low-precision torch gets wrong, doubled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# The bound on 1 - 2<x,y> / (|x|^2 + |y|^2), by the type of the result.
GLOBAL_BOUND = {torch.float32: 1e-10, torch.bfloat16: 1e-5}
# The element-wise bound is twice the low-precision error plus two units in the last place of the largest output.
ERROR_FACTOR = 2.0
ULPS = 2.0
POSITIONS_SHOWN = 5


def assert_close(
    actual: torch.Tensor | np.ndarray[Any, Any],
    exact64: torch.Tensor | np.ndarray[Any, Any],
    dtype: torch.dtype,
    low_precision: torch.Tensor | np.ndarray[Any, Any] | None = None,
    chained: bool = False,
) -> None:
    """Asserts that `actual`, computed in `dtype`, is the float64 result `exact64` up to rounding.

    `low_precision` is the result of the same maths in plain torch of that dtype; without it the element-wise bound is
    two ulp of the largest output alone. NaN and infinities must stand at the same positions with the same sign.

    chained: the result is made of several products in turn, each rounded to `dtype`, so that the whole tensor may be
    as far off as `low_precision` is, where that is more than the usual bound.
    """
    got, wanted = _as_float64(actual), _as_float64(exact64)
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    _assert_same_special_values(got, wanted)
    finite = torch.isfinite(wanted)
    difference = torch.where(finite, got - wanted, 0.0)
    finite_got, finite_wanted = torch.where(finite, got, 0.0), torch.where(finite, wanted, 0.0)

    bound = element_bound(finite_wanted, dtype, None if low_precision is None else _as_float64(low_precision))
    excess = difference.abs() > bound
    assert not bool(excess.any()), (
        f"{int(excess.sum())} of {excess.numel()} elements are off by more than {bound:.3e}; "
        f"worst: {_worst_positions(difference, got, wanted)}"
    )
    distance, most = relative_distance(finite_got, finite_wanted), GLOBAL_BOUND[dtype]
    if chained and low_precision is not None:
        most = max(most, relative_distance(torch.where(finite, _as_float64(low_precision), 0.0), finite_wanted))
    assert distance <= most, (
        f"1 - 2<x,y>/(|x|^2+|y|^2) is {distance:.3e}, wanted at most {most:.0e}; "
        f"worst: {_worst_positions(difference, got, wanted)}"
    )


def relative_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - 2<x,y> / (|x|^2 + |y|^2), written as |x - y|^2 / (|x|^2 + |y|^2), which does not cancel."""
    norms = float((x * x).sum() + (y * y).sum())
    return float(((x - y) ** 2).sum()) / norms if norms > 0 else 0.0


def element_bound(wanted: torch.Tensor, dtype: torch.dtype, low_precision: torch.Tensor | None) -> float:
    """The largest error that one element may have."""
    if wanted.numel() == 0:
        return 0.0
    bound = ULPS * ulp(float(wanted.abs().max()), dtype)
    if low_precision is not None:
        assert low_precision.shape == wanted.shape, "the low-precision result has another shape"
        error = torch.where(torch.isfinite(low_precision), (low_precision - wanted).abs(), 0.0)
        bound += ERROR_FACTOR * float(error.max())
    return bound


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance from `value` to the next larger number of `dtype` (normal numbers)."""
    info = torch.finfo(dtype)
    exponent = np.floor(np.log2(max(abs(value), float(info.tiny))))
    return float(info.eps * 2.0**exponent)


def _as_float64(x: torch.Tensor | np.ndarray[Any, Any]) -> torch.Tensor:
    tensor = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    return tensor.detach().to(device="cpu", dtype=torch.float64)


def _assert_same_special_values(got: torch.Tensor, wanted: torch.Tensor) -> None:
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        unequal = test(got) != test(wanted)
        if bool(unequal.any()):
            positions = unequal.nonzero()[:POSITIONS_SHOWN].tolist()
            raise AssertionError(f"{name} differs at {int(unequal.sum())} positions, first: {positions}")


def _worst_positions(difference: torch.Tensor, got: torch.Tensor, wanted: torch.Tensor) -> str:
    flat = difference.abs().flatten()
    worst = flat.topk(min(POSITIONS_SHOWN, flat.numel())).indices
    shown = []
    for index in worst.tolist():
        position = tuple(int(i) for i in np.unravel_index(index, tuple(difference.shape)))
        shown.append(f"{position}: got {float(got.flatten()[index]):.6g}, wanted {float(wanted.flatten()[index]):.6g}")
    return "; ".join(shown)
