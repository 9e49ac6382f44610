"""The formats of quantized weights: one small type each, for loader, kernels and tests alike.

A matrix is [..., rows, columns] and stands for `weight` in `input @ weight.T`; experts have a leading dimension. Codes
are stored as bytes: one in a byte (fp8, int8), or two with the even column in the low half (int4, nvfp4). That is the
layout of the public compressed-tensors formats, so what a checkpoint holds is used as it lies. `csrc/include/dgemma/
grouped_gemm.h` says the same in C.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

# What e2m1's sixteen codes stand for: one sign bit, two of exponent, one of mantissa.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
_E2M1_MAX = 6.0
# An int4 code is in [-8, 7], one of int8 in [-128, 127]; compressed-tensors scales the largest magnitude to the middle
# of both ends.
_INT4_MAX = 7.5
_INT8_MAX = 127.5

INT4_GROUPS = (32, 64, 128)
NVFP4_GROUP = 16


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """What the formats share. `values`: uint8 codes [..., rows, bytes]."""

    values: Tensor

    name: ClassVar[str]

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 where all of a row do."""
        return 0

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., rows, columns] of the matrix that is meant."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def kernel_scales(self) -> Tensor | None:
        """Scales of groups of columns, as the kernels take them."""
        return None

    @property
    def kernel_row_scales(self) -> Tensor | None:
        """float32, one for each equal run of rows, multiplied into the finished sums (`factors` in the C interface)."""
        return None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix [..., rows, columns], computed in float32 and rounded once to `dtype`."""
        raise NotImplementedError

    @staticmethod
    def nearest(x: Tensor) -> Tensor:
        """Of every number the nearest that the format has under a scale of one, ties to the even code; float32."""
        raise NotImplementedError

    @classmethod
    def codes_of(cls, x: Tensor) -> Tensor:
        """The codes of the nearest, as they are stored: uint8 [..., bytes]."""
        raise NotImplementedError

    @classmethod
    def from_kernel(cls, values: Tensor, scales: Tensor | None, row_scales: Tensor | None) -> Self:
        """The inverse of `values`, `kernel_scales` and `kernel_row_scales`; raises ValueError for scales that lack."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def expert(self, index: int) -> Self:
        """One matrix of a stack [experts, rows, columns]."""
        return replace(self, **{name: tensor[index] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales by the names of their fields."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


@dataclass(frozen=True, eq=False)
class RowScaledWeight(QuantizedWeight):
    """A byte for every value and a scale for every row, `scales`: float32 [..., rows]."""

    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def kernel_row_scales(self) -> Tensor:
        return self.scales

    @classmethod
    def from_kernel(cls, values: Tensor, scales: Tensor | None, row_scales: Tensor | None) -> Self:
        return cls(values, _present(cls, row_scales))


@dataclass(frozen=True, eq=False)
class Fp8Weight(RowScaledWeight):
    """e4m3 codes with a scale for every row: w = value * scale."""

    name = "fp8"

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return (self.values.view(torch.float8_e4m3fn).float() * self.scales[..., None]).to(dtype)

    @classmethod
    def quantize(cls, weight: Tensor) -> Self:
        """The nearest codes under a row's largest magnitude / 448, rounded to bfloat16 as checkpoints store it."""
        scales = _scales_of(weight.float().abs().amax(-1) / _E4M3_MAX, torch.bfloat16).float()
        return cls(cls.codes_of(weight.float() / scales[..., None]), scales)

    @staticmethod
    def nearest(x: Tensor) -> Tensor:
        return x.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()

    @classmethod
    def codes_of(cls, x: Tensor) -> Tensor:
        return x.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


@dataclass(frozen=True, eq=False)
class Int8Weight(RowScaledWeight):
    """Numbers q in [-128, 128) with a scale for every row: w = q * scale. What they multiply is rounded to int8 too,
    each row under its largest magnitude / 127. `values`: the bytes of int8 as uint8.
    """

    name = "int8"

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return (self.values.view(torch.int8).float() * self.scales[..., None]).to(dtype)

    @classmethod
    def quantize(cls, weight: Tensor) -> Self:
        """The nearest q under a row's largest magnitude / 127.5, rounded to bfloat16 as checkpoints store it."""
        scales = _scales_of(weight.float().abs().amax(-1) / _INT8_MAX, torch.bfloat16).float()
        return cls(cls.codes_of(weight.float() / scales[..., None]), scales)

    @staticmethod
    def nearest(x: Tensor) -> Tensor:
        return x.round().clamp(-128, 127)

    @classmethod
    def codes_of(cls, x: Tensor) -> Tensor:
        return cls.nearest(x).to(torch.int8).view(torch.uint8)


@dataclass(frozen=True, eq=False)
class Int4Weight(QuantizedWeight):
    """Numbers q in [-8, 8), stored as q + 8: w = q * scale. `scales`: bfloat16 or float16 [..., rows, groups]."""

    scales: Tensor

    name = "int4"

    @property
    def group(self) -> int:
        return self.shape[-1] // self.scales.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], 2 * self.values.shape[-1])

    @property
    def kernel_scales(self) -> Tensor:
        return self.scales

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        values = _nibbles(self.values).float() - 8
        return _times_groups(values, self.scales.float(), self.group).to(dtype)

    @classmethod
    def quantize(cls, weight: Tensor, group: int) -> Self:
        """The nearest q under a group's largest magnitude / 7.5, rounded to bfloat16."""
        grouped = weight.float().unflatten(-1, (-1, group))
        scales = _scales_of(grouped.abs().amax(-1) / _INT4_MAX, torch.bfloat16)
        return cls(cls.codes_of(grouped / scales.float()[..., None]).flatten(-2), scales)

    @staticmethod
    def nearest(x: Tensor) -> Tensor:
        return x.round().clamp(-8, 7)

    @classmethod
    def codes_of(cls, x: Tensor) -> Tensor:
        return _packed((cls.nearest(x) + 8).to(torch.uint8))

    @classmethod
    def from_kernel(cls, values: Tensor, scales: Tensor | None, row_scales: Tensor | None) -> Self:
        return cls(values, _present(cls, scales))


@dataclass(frozen=True, eq=False)
class Nvfp4Weight(QuantizedWeight):
    """e2m1 codes, an e4m3 scale for 16 columns, and a float32 scale for a run of rows (a stored tensor's).

    w = value * (scale / global_scale) in compressed-tensors' files, value * (scale * global_scale) in ModelOpt's.
    `scales`: uint8 (e4m3) [..., rows, columns / 16]; `global_scales`: float32 [..., runs], `runs` a divisor of rows.
    """

    scales: Tensor
    global_scales: Tensor
    divides: bool

    name = "nvfp4"

    @property
    def group(self) -> int:
        return NVFP4_GROUP

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], 2 * self.values.shape[-1])

    @property
    def kernel_scales(self) -> Tensor:
        return self.scales

    @cached_property
    def kernel_row_scales(self) -> Tensor:
        return self.global_scales.reciprocal() if self.divides else self.global_scales

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        levels = torch.tensor(E2M1_VALUES, device=self.device)
        values = levels[_nibbles(self.values).long()]
        runs = self.global_scales.repeat_interleave(self.shape[-2] // self.global_scales.shape[-1], -1)[..., None]
        scales = self.scales.view(torch.float8_e4m3fn).float()
        return _times_groups(values, scales / runs if self.divides else scales * runs, NVFP4_GROUP).to(dtype)

    @classmethod
    def quantize(cls, weight: Tensor, runs: int = 1, global_scales: Tensor | None = None) -> Self:
        """The nearest codes under a group's largest magnitude / 6.

        runs: equal runs of rows with a global scale each: 2 for the gate and up rows of experts. global_scales:
        float32 [..., runs], by which group scales are multiplied before they are rounded to e4m3; default 448 * 6 / the
        largest magnitude of each run, which uses e4m3's whole range.
        """
        grouped = weight.float().unflatten(-1, (-1, NVFP4_GROUP)).unflatten(-3, (runs, -1))
        largest = grouped.abs().amax(-1)
        if global_scales is None:
            global_scales = cls.global_scale_of(largest.amax((-1, -2)))
        divisor = global_scales[..., None, None]
        scales = _scales_of((largest / _E2M1_MAX * divisor).clamp(max=_E4M3_MAX), torch.float8_e4m3fn)
        codes = cls.codes_of(grouped / (scales.float() / divisor)[..., None])
        return cls(
            codes.flatten(-2).flatten(-3, -2),
            scales.view(torch.uint8).flatten(-3, -2),
            global_scales,
            divides=True,
        )

    @staticmethod
    def global_scale_of(largest: Tensor) -> Tensor:
        """448 * 6 / the largest magnitude, with which group scales use e4m3's whole range; 1 where all are zero."""
        whole = largest.clamp(min=torch.finfo(torch.float32).tiny)
        return torch.nan_to_num(_E4M3_MAX * _E2M1_MAX / whole, nan=1.0, posinf=1.0)

    @staticmethod
    def nearest(x: Tensor) -> Tensor:
        return torch.tensor(E2M1_VALUES, device=x.device)[_nearest_e2m1(x).long()]

    @classmethod
    def codes_of(cls, x: Tensor) -> Tensor:
        return _packed(_nearest_e2m1(x))

    @classmethod
    def from_kernel(cls, values: Tensor, scales: Tensor | None, row_scales: Tensor | None) -> Self:
        return cls(values, _present(cls, scales), _present(cls, row_scales), divides=False)


@dataclass(frozen=True)
class Format:
    """What is true of a format wherever it is met: here is the one list of them.

    number: dgemma_weight_format of the C interface. bits: of a code. groups: how many columns may share a scale, the
    usual number first; empty where all of a row do. group_scale_bytes, row_scale_bytes: of a scale of a group and of a
    row; the few scales of a whole tensor count for nothing.
    """

    name: str
    number: int
    weight: type[QuantizedWeight]
    bits: int
    groups: tuple[int, ...] = ()
    group_scale_bytes: int = 0
    row_scale_bytes: int = 0

    @property
    def usual_group(self) -> int:
        """0 where all of a row share a scale."""
        return self.groups[0] if self.groups else 0

    def nbytes(self, values: int, columns: int, group: int) -> int:
        """Bytes of codes and scales of so many values in rows of so many columns."""
        per_value = self.bits / 8 + (self.group_scale_bytes / (group or self.usual_group) if self.groups else 0)
        return round(values * per_value) + self.row_scale_bytes * values // columns


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("fp8", number=1, weight=Fp8Weight, bits=8, row_scale_bytes=4),
        Format("int4", number=2, weight=Int4Weight, bits=4, groups=INT4_GROUPS, group_scale_bytes=2),
        Format("int8", number=4, weight=Int8Weight, bits=8, row_scale_bytes=4),
        Format("nvfp4", number=3, weight=Nvfp4Weight, bits=4, groups=(NVFP4_GROUP,), group_scale_bytes=1),
    )
}


def format_by_number(number: int) -> Format:
    """Raises KeyError for a number that is none."""
    return {form.number: form for form in FORMATS.values()}[number]


def _present(kind: type[QuantizedWeight], scales: Tensor | None) -> Tensor:
    if scales is None:
        raise ValueError(f"scales: got None, wants those of {kind.name}")
    return scales


def _scales_of(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to the dtype they are stored in; one that is zero there becomes its epsilon, as where all weights
    of a group are zero."""
    rounded = scales.to(dtype)
    return torch.where(rounded.float() == 0, torch.finfo(dtype).eps, rounded.float()).to(dtype)


def _times_groups(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """values [..., columns] times the scale of their group [..., groups]."""
    return values * scales.repeat_interleave(group, -1)


def _nearest_e2m1(x: Tensor) -> Tensor:
    """Codes of the nearest values, ties to the even code, beyond 6 to 6."""
    # Halfway between neighbours; at a tie the even one of the two codes is taken.
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=x.device)
    magnitude = x.abs().contiguous()
    below = torch.bucketize(magnitude, borders)  # a tie goes down
    above = torch.bucketize(magnitude, borders, right=True)  # a tie goes up
    code = torch.where(below % 2 == 0, below, above)
    return (code + 8 * (x < 0)).to(torch.uint8)


def _packed(codes: Tensor) -> Tensor:
    """uint8 [..., columns] below 16 to two in a byte, the even column in the low half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _nibbles(values: Tensor) -> Tensor:
    """The inverse of `_packed`."""
    return torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)
