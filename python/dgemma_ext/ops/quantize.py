"""Numbers to codes and scales: of every group of columns the scale is searched that loses least.

What is lost is importance * (quantized - weight)^2, summed over a group, where `importance` is the second moment of a
matrix's input: then it is the square that the error adds to the product's outputs, if the inputs are independent. The
scale that maps the largest magnitude to the format's end (formats.py: `quantize`) is kept where no other loses less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma_ext.ops.formats import (
    FORMATS,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    Nvfp4Weight,
    QuantizedWeight,
)
from dgemma_ext.ops.operators import operator

# The operator itself, which writes into the last three: csrc/include/dgemma/quantize.h has its meaning.
quantize_weight = operator("quantize_weight")

# The global scales of nvfp4 that are tried, as parts of the one that uses e4m3's whole range: the scales of groups then
# fall elsewhere between the numbers of e4m3, of which there are eight to an octave. Of normal weights the best of many
# loses 0.02 % less than the first, so a sample of the rows decides.
_GLOBAL_STEPS = (1.0, 0.94, 0.88, 0.82)
_ROWS_OF_A_SAMPLE = 32


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix and the squares it was made by, sums over the matrix of importance times: `size`, of the
    values; `before`, of the errors under the largest magnitude's scale; `error`, of those that are left."""

    weight: QuantizedWeight
    size: float
    before: float
    error: float


def quantize(matrices: list[Tensor], format: str, group: int, importance: Tensor | None = None) -> list[Quantized]:
    """Quantizes matrices that other engines multiply as one, by the scales that lose least.

    In nvfp4 they share the global scale, which is searched too. On the CPU by a kernel, elsewhere by torch's operators,
    which try fewer scales.

    Args:
        matrices: each [rows, columns], float32, bfloat16 or float16.
        format: a name of formats.FORMATS.
        group: columns that share a scale, a divisor of the columns; 0 where a row has one.
        importance: [columns] for all of them, 0 or more; None stands for ones.

    Raises:
        KeyError: an unknown format.
        ValueError: columns that no group divides, or more than 16,384.
    """
    FORMATS[format]
    matrices = [_taken(matrix) for matrix in matrices]
    if format == "nvfp4":
        return _nvfp4(matrices, importance)
    return [_by_rows(matrix, format, group, importance) for matrix in matrices]


def _taken(matrix: Tensor) -> Tensor:
    """What the operator takes: float16 has no kernel of its own."""
    return (matrix.float() if matrix.dtype == torch.float16 else matrix).contiguous()


def _by_rows(matrix: Tensor, format: str, group: int, importance: Tensor | None) -> Quantized:
    values, scales, errors = _run(matrix, format, group, 1.0, importance)
    weight: QuantizedWeight
    if format == "int4":
        weight = Int4Weight(values, scales.to(torch.bfloat16))
    else:
        kind = Int8Weight if format == "int8" else Fp8Weight
        weight = kind(values, scales[:, 0].contiguous())
    return Quantized(weight, *errors.sum(0).tolist())


def _nvfp4(matrices: list[Tensor], importance: Tensor | None) -> list[Quantized]:
    """With the global scale under which some rows of all matrices lose least."""
    largest = torch.stack([matrix.float().abs().amax() for matrix in matrices]).amax()
    whole = Nvfp4Weight.global_scale_of(largest)
    some = [matrix[:: max(1, len(matrix) // _ROWS_OF_A_SAMPLE)].contiguous() for matrix in matrices]

    def lost(step: float) -> float:
        return sum(float(_run(rows, "nvfp4", 0, float(whole * step), importance)[2][:, 2].sum()) for rows in some)

    scale = whole * min(_GLOBAL_STEPS, key=lost)
    made = [_run(matrix, "nvfp4", 0, float(scale), importance) for matrix in matrices]
    return [
        Quantized(Nvfp4Weight(values, _as_e4m3(scales), scale.reshape(1), divides=True), *errors.sum(0).tolist())
        for values, scales, errors in made
    ]


def _as_e4m3(scales: Tensor) -> Tensor:
    return scales.to(torch.float8_e4m3fn).view(torch.uint8)


def _run(
    matrix: Tensor, format: str, group: int, multiplier: float, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales as they are stored (in float32), and errors [rows, 3] of one matrix."""
    form = FORMATS[format]
    rows, columns = matrix.shape
    group = group or form.usual_group or columns
    if columns % group:
        raise ValueError(f"group: got {group} for {columns} columns, wants a divisor")
    values = matrix.new_empty((rows, columns * form.bits // 8), dtype=torch.uint8)
    scales = matrix.new_empty((rows, columns // group), dtype=torch.float32)
    errors = matrix.new_empty((rows, 3), dtype=torch.float64)
    given = None if importance is None else importance.to(matrix.device, torch.float32).contiguous()
    quantize_weight(matrix, given, form.number, multiplier, values, scales, errors)
    return values, scales, errors
