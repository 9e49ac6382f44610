"""The operator `quantize_weight` in torch's operators: a GPU's form, which has no kernel.

A launch a scale and matrix would take longer than the work, so of the scales that the kernel (csrc/quantize) tries this
tries some: errors of normal weights are 0.5 % larger than the kernel's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from dgemma_ext.ops.formats import FORMATS, QuantizedWeight, format_by_number
from dgemma_ext.ops.plain.registration import register


@dataclass(frozen=True)
class _Search:
    """What the largest magnitude is scaled to, the dtype of scales, and the multiples of that scale that are tried."""

    most: float
    scales: torch.dtype
    tried: tuple[float, ...]


_SEARCHES = {
    "fp8": _Search(448.0, torch.bfloat16, tuple(2 ** (step / 16) for step in range(1, 16))),
    "int8": _Search(127.5, torch.bfloat16, tuple(0.6 + 0.02 * step for step in range(20))),
    "int4": _Search(7.5, torch.bfloat16, tuple(0.55 + 0.03 * step for step in range(20))),
    "nvfp4": _Search(6.0, torch.float8_e4m3fn, tuple(0.6 * 2 ** (step / 8) for step in range(13))),
}


def quantize_weight(
    weight: Tensor,
    importance: Tensor | None,
    format: int,
    multiplier: float,
    values: Tensor,
    scales: Tensor,
    errors: Tensor,
) -> None:
    """As csrc/include/dgemma/quantize.h says, from a float32 copy of the weight."""
    _check(weight, format, multiplier, values, scales)
    name = format_by_number(format).name
    kind, search = format_by_number(format).weight, _SEARCHES[name]
    grouped = weight.float().unflatten(-1, (scales.shape[-1], -1))
    factors = torch.ones_like(grouped[0]) if importance is None else importance.unflatten(0, grouped.shape[1:])
    usual = _rounded(grouped.abs().amax(-1) / search.most * multiplier, search.scales)
    best, least = usual, _lost(kind, grouped, factors, usual / multiplier)
    before = least
    for multiple in search.tried:
        tried = _rounded(usual * multiple, search.scales)
        lost = _lost(kind, grouped, factors, tried / multiplier)
        better = (lost < least) & (tried > 0)
        best, least = torch.where(better, tried, best), torch.where(better, lost, least)
    # The scale of a group of zeros.
    best = torch.where(usual > 0, best, torch.finfo(search.scales).eps)
    scales.copy_(best)
    values.copy_(kind.codes_of(grouped / (best / multiplier)[..., None]).view(values.shape))
    for column, squares in enumerate((factors * grouped.square(), before, least)):
        errors[:, column] = squares.double().flatten(1).sum(-1)


def _check(weight: Tensor, format: int, multiplier: float, values: Tensor, scales: Tensor) -> None:
    """Refuses what csrc/quantize/cpu/entry_points.cpp does beyond the description, in like words."""

    def refuse(name: str, got: object, wants: str) -> NoReturn:
        raise ValueError(f"dgemma::quantize_weight: {name}: got {got}, wants {wants}")

    if format not in {form.number for form in FORMATS.values()}:
        refuse("format", format, "the number of one")
    if not multiplier > 0:
        refuse("multiplier", multiplier, "a number above 0")
    form, columns = format_by_number(format), weight.shape[-1]
    groups = {columns} if not form.groups else set(form.groups)
    if columns % scales.shape[-1] or columns // scales.shape[-1] not in groups:
        refuse("scales", f"{scales.shape[-1]} for a row of {columns} columns of {form.name}", "one for each group")
    if values.shape[-1] * 8 != columns * form.bits:
        refuse("values", f"{values.shape[-1]} bytes for a row of {columns} columns", f"{columns * form.bits // 8}")


def _rounded(scales: Tensor, dtype: torch.dtype) -> Tensor:
    return scales.clamp(max=torch.finfo(dtype).max).to(dtype).float()


def _lost(kind: type[QuantizedWeight], grouped: Tensor, factors: Tensor, scales: Tensor) -> Tensor:
    """importance * (the nearest value of x / scale, times scale, - x)^2, summed over each group."""
    wide = scales[..., None]
    nearest = torch.where(wide > 0, kind.nearest(grouped / wide) * wide, 0.0)
    return (factors * (nearest - grouped).square()).sum(-1)


register("dgemma::quantize_weight", quantize_weight)
