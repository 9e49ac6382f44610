"""Products over rows that are sorted by expert: rows [n, in], of which those before ends[e] belong to experts 0 .. e.

torch's grouped_mm multiplies where it takes the dtype and the strides, else one product for each expert that has rows.
A quantized weight is dequantized a few experts at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext.ops.formats import QuantizedWeight

# Experts that are dequantized together: 16 of the published size are 190 MB in bfloat16.
EXPERTS_AT_ONCE = 16
# grouped_mm wants strides in multiples of so many bytes.
_STRIDE_BYTES = 16

Product = Callable[[Tensor, Tensor], Tensor]


def sort_by_expert(expert_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The order that sorts the entries of int [tokens, top_k] by expert, [tokens * top_k], and int32 `ends`."""
    flat = expert_ids.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    ends = torch.bincount(flat, minlength=experts).cumsum(0).to(torch.int32)
    return order, ends


def product(rows: Tensor, weight: Tensor | QuantizedWeight, ends: Tensor) -> Tensor:
    """Row i times weight[e].T for its expert e: rows [n, in], weight [experts, out, in], result [n, out]."""
    if isinstance(weight, QuantizedWeight):
        return _dequantized(rows, weight, ends, weight.shape[1], product)
    if _grouped_mm_takes(rows, weight):
        return functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return _by_expert(rows, weight, ends, weight.shape[1], functional.linear)


def transposed_product(rows: Tensor, weight: Tensor | QuantizedWeight, ends: Tensor) -> Tensor:
    """Row i times weight[e]: rows [n, out], weight [experts, out, in], result [n, in]."""
    if isinstance(weight, QuantizedWeight):
        return _dequantized(rows, weight, ends, weight.shape[2], transposed_product)
    if _grouped_mm_takes(rows, weight):
        return functional.grouped_mm(rows, weight, offs=ends)
    return _by_expert(rows, weight, ends, weight.shape[2], torch.matmul)


def outer_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """The sum over an expert's rows of left[i] right[i].T: [n, a] and [n, b] give [experts, a, b], zero for an expert
    without rows."""
    out = left.new_zeros((len(ends), left.shape[1], right.shape[1]))
    for expert, first, last in _ranges(ends):
        torch.mm(left[first:last].t(), right[first:last], out=out[expert])
    return out


def _grouped_mm_takes(rows: Tensor, weight: Tensor) -> bool:
    if rows.dtype not in (torch.bfloat16, torch.float32) or (rows.is_cuda and rows.dtype != torch.bfloat16):
        return False
    aligned = _STRIDE_BYTES // rows.element_size()
    return rows.shape[1] % aligned == 0 and all(size % aligned == 0 for size in weight.shape[1:])


def _ranges(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end) of every expert that has rows. It waits for the device."""
    first = 0
    for expert, last in enumerate(ends.tolist()):
        if last > first:
            yield expert, first, last
        first = last


def _by_expert(rows: Tensor, weight: Tensor, ends: Tensor, width: int, multiply: Product) -> Tensor:
    out = rows.new_empty((rows.shape[0], width))
    for expert, first, last in _ranges(ends):
        out[first:last] = multiply(rows[first:last], weight[expert])
    return out


def _dequantized(
    rows: Tensor,
    weight: QuantizedWeight,
    ends: Tensor,
    width: int,
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """`multiply` with the weights of the experts that have rows, a few of them at a time."""
    out = rows.new_empty((rows.shape[0], width))
    ranges = list(_ranges(ends))
    for begin in range(0, len(ranges), EXPERTS_AT_ONCE):
        some = ranges[begin : begin + EXPERTS_AT_ONCE]
        matrices = torch.stack([weight.expert(expert).dequantized(rows.dtype) for expert, _, _ in some])
        first, last = some[0][1], some[-1][2]
        own_ends = torch.tensor([end - first for _, _, end in some], dtype=torch.int32, device=rows.device)
        out[first:last] = multiply(rows[first:last], matrices, own_ends)
    return out
