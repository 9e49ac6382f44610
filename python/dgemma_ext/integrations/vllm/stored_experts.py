"""How a quantized checkpoint stores the experts of a layer, and the tensors that hold a rank's part of them.

A stored part (Part) of every expert's projections has a place in one parameter, laid out so that a QuantizedWeight is a
view of the parameters: nothing is copied or repacked, and no second form of a weight exists. Needs no vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma_ext.ops.formats import FORMATS, Fp8Weight, Int4Weight, Int8Weight, Nvfp4Weight, QuantizedWeight

_E4M3 = torch.float8_e4m3fn
# Of a finished parameter: what a matrix's rows share, as vLLM's loader of experts names it.
CHANNEL, GROUP, TENSOR = "channel", "group", "tensor"


@dataclass(frozen=True)
class Part:
    """A stored tensor of one projection of one expert.

    suffix: of its name. role: "values", "scales", "global_scales", or "unread". dtypes: that it may be stored in; the
    first is its parameter's, where `keeps_dtype` is not set. columns: of the matrix that one column of it stands for; 0
    where it has one for each row, None where it has one for the matrix.
    """

    suffix: str
    role: str
    dtypes: tuple[torch.dtype, ...] = ()
    columns: int | None = None
    keeps_dtype: bool = False

    @property
    def shared(self) -> str | None:
        """What vLLM's loader asks of a parameter of scales."""
        if self.role == "values":
            return None
        return TENSOR if self.columns is None else GROUP if self.columns else CHANNEL

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """The shapes that it may be stored in, for a matrix [rows, columns]."""
        if self.columns is None:
            return (), (1,)
        return ((rows, columns // self.columns if self.columns else 1),)

    def parameter(self, experts: int, projections: int, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the parameter for so many experts, whose projections' rows follow each other."""
        if self.role == "unread":
            return (0,)
        if self.columns is None:
            return (experts,) if projections == 1 else (experts, projections)
        return (experts, projections * rows, columns // self.columns if self.columns else 1)

    def unloaded(self, shape: tuple[int, ...]) -> Tensor:
        """The data of its parameter before anything is loaded. Scales are NaN, so that what no loader has filled is
        found: vLLM itself does not ask whether the parameters of a quantized checkpoint were loaded."""
        data = torch.empty(shape, dtype=self.dtypes[0] if self.dtypes else torch.float32)
        return data.fill_(float("nan")) if self.role in ("scales", "global_scales") else data


def is_unloaded(scales: Tensor) -> bool:
    """Whether the data of a parameter of scales is still that of `Part.unloaded`, by its first value."""
    return bool(scales.flatten()[0].to(torch.float32).isnan())


@dataclass(frozen=True)
class Scheme:
    """format: of ops.formats.FORMATS. groups: columns that share a scale, of gate and up, and of down; 0 where a row
    does. by_matrix: fp8 and int8 with one scale for a stored matrix. modelopt: nvfp4 by ModelOpt's names, whose scale
    of a matrix multiplies."""

    format: str
    groups: tuple[int, int] = (0, 0)
    by_matrix: bool = False
    modelopt: bool = False

    def parts(self, group: int) -> tuple[Part, ...]:
        match self.format:
            case "fp8" | "int8":
                values = _E4M3 if self.format == "fp8" else torch.int8
                scales = (torch.float32, torch.bfloat16, torch.float16)
                return (
                    Part("weight", "values", (values,), 1),
                    Part("weight_scale", "scales", scales, None if self.by_matrix else 0),
                    Part("input_scale", "unread"),
                )
            case "int4":
                return (
                    Part("weight_packed", "values", (torch.int32,), 8),
                    Part("weight_scale", "scales", (torch.bfloat16, torch.float16), group, keeps_dtype=True),
                    Part("weight_shape", "unread"),
                )
            case "nvfp4":
                names = ("weight", "weight_scale_2", "input_scale")
                values_name, global_name, unread = (
                    names if self.modelopt else ("weight_packed", "weight_global_scale", "input_global_scale")
                )
                return (
                    Part(values_name, "values", (torch.uint8,), 2),
                    Part("weight_scale", "scales", (_E4M3,), group),
                    Part(global_name, "global_scales", (torch.float32,)),
                    Part(unread, "unread"),
                )
        raise KeyError(self.format)

    def weight(self, tensors: dict[str, Tensor], projections: int) -> QuantizedWeight:
        """The stack of experts that the parameters hold, by role; views of them but for scales of whole matrices.

        projections: stored matrices in the rows of an expert: 2 for gate and up, 1 for down.
        """
        values, scales = tensors["values"].view(torch.uint8), tensors["scales"]
        match self.format:
            case "fp8" | "int8":
                if self.by_matrix:
                    rows = values.shape[1] // projections
                    scales = scales.view(-1, projections).repeat_interleave(rows, 1)
                kind = Fp8Weight if self.format == "fp8" else Int8Weight
                return kind(values, scales.view(scales.shape[0], -1))
            case "int4":
                return Int4Weight(values, scales)
            case "nvfp4":
                global_scales = tensors["global_scales"].view(-1, projections)
                return Nvfp4Weight(values, scales.view(torch.uint8), global_scales, divides=not self.modelopt)
        raise KeyError(self.format)

    def refusal(self, hidden_size: int, expert_size: int, cuda: bool) -> str | None:
        """Why the operator does not multiply such experts, or None.

        The limits are those of csrc/include/dgemma/grouped_gemm.h: dgemma_moe_ffn_quantized and its form for a GPU.
        """
        grouped = bool(FORMATS[self.format].groups)
        multiple = (32 if grouped else 16) if cuda else (16 if self.format == "nvfp4" else 2 if grouped else 1)
        for name, columns in (("hidden size", hidden_size), ("size of an expert on this rank", expert_size)):
            if columns % multiple or columns > 16_384:
                return f"the {name} is {columns}, and {self.format} wants a multiple of {multiple} up to 16384"
        return None


def keep(kept: dict[str, Tensor], made: dict[str, Tensor]) -> None:
    """Writes what is loaded anew into the tensors that a kernel, or a captured graph, reads already."""
    for name, tensor in made.items():
        if kept[name].data_ptr() != tensor.data_ptr():
            kept[name].copy_(tensor)


def first_fault(weight: QuantizedWeight) -> tuple[int, str] | None:
    """The first expert of a stack with values that no weight may have, and what they are; None where there are none.

    As the loader of this package's own has it (checkpoint/reading.py): NaN among the codes, scales that are not finite,
    and zero where a kernel may divide by it. Expert by expert, so that no mask of the whole stack is made; the host
    reads once.
    """
    tests = [_tests(weight.expert(index)) for index in range(weight.shape[0])]
    found = torch.stack([bad for of_expert in tests for _, bad in of_expert]).view(len(tests), -1).tolist()
    for expert, flags in enumerate(found):
        if any(flags):
            return expert, tests[expert][flags.index(True)][0]
    return None


def fault_of(matrix: QuantizedWeight) -> str | None:
    """The same of one matrix."""
    return next((what for what, bad in _tests(matrix) if bool(bad)), None)


def _tests(expert: QuantizedWeight) -> list[tuple[str, Tensor]]:
    """What may be wrong with a matrix, each with whether it is."""
    match expert:
        case Fp8Weight():
            return [("NaN among its codes", _nan_of_e4m3(expert.values)), _of_scales(expert.scales)]
        case Int8Weight():
            return [_of_scales(expert.scales), ("a scale of zero", (expert.scales == 0).any())]
        case Int4Weight():
            return [_of_scales(expert.scales)]
        case Nvfp4Weight():
            return [
                ("a scale that is NaN", _nan_of_e4m3(expert.scales)),
                _of_scales(expert.global_scales),
                ("a global scale of zero", (expert.global_scales == 0).any()),
            ]
    raise KeyError(expert.name)


def _of_scales(scales: Tensor) -> tuple[str, Tensor]:
    return "a scale that is not finite", (~scales.isfinite()).any()


def _nan_of_e4m3(codes: Tensor) -> Tensor:
    return ((codes & 0x7F) == 0x7F).any()
