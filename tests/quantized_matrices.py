"""Matrices in the quantized formats as in a checkpoint, and their values in float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

FP8, INT4, NVFP4, INT8 = 1, 2, 3, 4
# The numbers of dgemma_dtype for the types of int4's scales.
SCALE_DTYPES = {torch.bfloat16: 1, torch.float16: 2}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
ROOM_BEHIND = 256  # bytes


class Quantized(ctypes.Structure):
    """dgemma_quantized of csrc/include/dgemma/grouped_gemm.h."""

    _fields_ = [
        ("format", ctypes.c_int),
        ("group", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("scale_dtype", ctypes.c_int),
        ("factors", ctypes.c_void_p),
        ("rows_per_factor", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class Format:
    format: int
    group: int = 0
    scale_dtype: torch.dtype = torch.float8_e4m3fn

    def __str__(self) -> str:
        kind = {FP8: "fp8", INT4: "int4", NVFP4: "nvfp4", INT8: "int8"}[self.format]
        return f"{kind}-{self.group}-{str(self.scale_dtype)[6:]}" if self.format == INT4 else kind


FORMATS = [Format(FP8), Format(NVFP4, 16)]
FORMATS += [Format(INT4, group, torch.bfloat16) for group in (32, 64, 128)]
FORMATS += [Format(INT4, 32, torch.float16), Format(INT4, 128, torch.float16)]
FIRST_FORMATS = [FORMATS[0], FORMATS[1], FORMATS[4], FORMATS[5]]


@dataclass
class Matrix:
    """A quantized matrix [.., rows, columns] as in a checkpoint."""

    format: Format
    values: Tensor  # uint8 [.., rows, columns] or [.., rows, columns / 2]
    scales: Tensor | None  # [.., rows, groups] of format.scale_dtype
    factors: Tensor | None  # float32, one for each rows_per_factor rows
    rows_per_factor: int = 1

    def describe(self) -> Quantized:
        pointer = [None if x is None else x.data_ptr() for x in (self.values, self.scales, self.factors)]
        scale_dtype = SCALE_DTYPES.get(self.format.scale_dtype, 77)
        return Quantized(
            self.format.format, self.format.group, *pointer[:2], scale_dtype, pointer[2], self.rows_per_factor
        )

    def exact(self) -> Tensor:
        """The weights in float64."""
        if self.format.format == FP8:
            weights = self.values.view(torch.float8_e4m3fn).double()
        elif self.format.format == INT8:
            weights = self.values.view(torch.int8).double()
        else:
            codes = torch.stack([self.values & 15, self.values >> 4], -1).flatten(-2).long()
            weights = E2M1[codes] if self.format.format == NVFP4 else codes.double() - 8
            assert self.scales is not None
            scales = self.scales.double().repeat_interleave(self.format.group, -1)
            weights = weights * scales[..., : weights.shape[-1]]
        if self.factors is not None:
            factors = self.factors.double().repeat_interleave(self.rows_per_factor)
            weights = weights * factors.view(*weights.shape[:-1], 1)
        return weights


def packed(codes: Tensor) -> Tensor:
    """Packs two codes in a byte; the even column has the low half."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def behind(tensor: Tensor, poison: int) -> Tensor:
    """The tensor, followed by bytes that must not be read."""
    room = torch.full((tensor.numel() * tensor.element_size() + ROOM_BEHIND,), poison, dtype=torch.uint8)
    room = room[: room.numel() // 16 * 16]
    copy = room[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy


def quantize(weight: Tensor, format: Format, rows_per_factor: int) -> Matrix:
    """Quantizes to the nearest code, with scales by the largest value of a group and a factor for every block."""
    columns = weight.shape[-1]
    blocks = weight.reshape(-1, rows_per_factor * columns)
    if format.format == FP8:
        factors = weight.abs().amax(-1).flatten() / 448
        codes = (weight.flatten(0, -2) / factors[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
        return Matrix(format, behind(codes.view(weight.shape), 0x7F), None, factors)
    if format.format == INT8:
        factors = blocks.abs().amax(-1) / 127
        codes = (blocks / factors[:, None]).round().to(torch.int8).view(torch.uint8)
        return Matrix(format, behind(codes.view(weight.shape), 0x7F), None, factors, rows_per_factor)
    groups = -(-columns // format.group)
    padded = torch.nn.functional.pad(weight, (0, groups * format.group - columns))
    largest = padded.view(*weight.shape[:-1], groups, format.group).abs().amax(-1)
    if format.format == INT4:
        # Not a power of two and different for every block, so that using another block's factor is more than rounding.
        factors = torch.linspace(0.3, 3, len(blocks))
        per_row = factors.repeat_interleave(rows_per_factor).view(*weight.shape[:-1], 1)
        scales = (largest / per_row / 7).to(format.scale_dtype)
        unit = scales.float().repeat_interleave(format.group, -1)[..., :columns] * per_row
        codes = (weight / unit).round().clamp(-8, 7).int() + 8
    else:
        factors = blocks.abs().amax(-1) / (6 * 448)
        per_row = factors.repeat_interleave(rows_per_factor).view(*weight.shape[:-1], 1)
        scales = (largest / per_row / 6).to(format.scale_dtype)
        unit = scales.float().repeat_interleave(16, -1)[..., :columns] * per_row
        codes = ((weight / unit)[..., None] - E2M1.float()).abs().argmin(-1)
    return Matrix(format, behind(packed(codes), 0xFF), behind(scales, 0xFF), factors, rows_per_factor)
