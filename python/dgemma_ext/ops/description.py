"""The operators as `_C.operators()` describes them (csrc/torch/operator.h), for calls that no kernel of ours sees.

A kernel's call is checked by the C++ side of the description. Two kinds of call do not get there: tensors without data
(FakeTensor, "meta"), and operators that torch's own make up (ops/plain). For both the same description is read here, so
that they refuse what a kernel refuses, in the same words, and give results of the shapes and dtypes that it gives.
Importing this registers the form without data of every operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, library

import dgemma_ext._C as _C

_NUMBERS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Extent:
    """times * sizes[name] / per, rounded up, and `more`; without a name it is `times`, and -1 is any."""

    name: str
    times: int
    per: int
    more: int
    least: int
    multiple_of: str

    def value(self, sizes: Mapping[str, int]) -> int:
        return -(-self.times * sizes[self.name] // self.per) + self.more if self.name else self.times


@dataclass(frozen=True)
class Number:
    name: str
    dtype: str
    field: str
    least: int
    most: int
    most_of: str
    finite: bool


@dataclass(frozen=True)
class Operand:
    """A tensor. `dtype`: "number" is float32 or bfloat16, one for all of a call; "" is unknown here. `scales_rows_of`:
    the quantized matrix whose rows these scales are of; any number that divides them will do. `strided`: only the last
    dimension is contiguous."""

    name: str
    dtype: str
    shape: tuple[Extent, ...]
    optional: bool
    with_previous: bool
    any_shape: bool
    strided: bool
    scales_rows_of: str


@dataclass(frozen=True)
class Operator:
    name: str
    arguments: tuple[Number | Operand, ...]
    outputs: tuple[Operand, ...]
    has_out: bool


@dataclass
class Call:
    """What the tensors of a call agree on."""

    first: Tensor
    sizes: dict[str, int]
    number: torch.dtype | None = None
    any_shape: torch.Size | None = None


def _argument(described: dict[str, Any]) -> Number | Operand:
    is_tensor = described.pop("is_tensor")
    kind = Operand if is_tensor else Number
    if is_tensor:
        described["shape"] = tuple(Extent(*extent) for extent in described["shape"])
    return kind(**{name: value for name, value in described.items() if name in kind.__dataclass_fields__})


def _operator(described: dict[str, Any]) -> Operator:
    arguments, outputs = (tuple(map(_argument, described[key])) for key in ("arguments", "outputs"))
    assert all(isinstance(output, Operand) for output in outputs)
    return Operator(described["name"], arguments, outputs, described["has_out"])  # type: ignore[arg-type]


OPERATORS: dict[str, Operator] = {made.name: made for made in map(_operator, _C.operators())}


def check(name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Call:
    """Raises ValueError as a kernel does, but for what only values show. `keywords`: outputs of the form `out`."""
    described = OPERATORS[name]
    pairs: list[tuple[Number | Operand, Any]] = list(zip(described.arguments, arguments, strict=True))
    pairs += [(output, keywords[output.name]) for output in described.outputs if output.name in keywords]
    refuse = partial(_refuse, name)
    tensors = [(operand, value) for operand, value in pairs if isinstance(operand, Operand) and value is not None]
    call = Call(tensors[0][1], {n.field: value for n, value in pairs if isinstance(n, Number) and n.field})
    for exactly in (True, False):
        _find_extents(call, tensors, exactly, refuse)
    previous = None
    for argument, value in pairs:
        if isinstance(argument, Number):
            _check_number(argument, value, call, refuse)
        elif argument.with_previous and (value is None) != (previous[1] is None):  # type: ignore[index]
            missing, other = (argument, previous[0]) if value is None else (previous[0], argument)  # type: ignore[index]
            refuse(missing.name, None, f"both it and {other.name} or neither")
        elif value is not None:
            _check_tensor(argument, value, call, refuse)
        previous = (argument, value)
    if keywords.get("workspace") is not None:
        _check_workspace(keywords["workspace"], call, refuse)
    return call


def _refuse(operator: str, name: str, got: object, want: object) -> NoReturn:
    raise ValueError(f"dgemma::{operator}: {name}: got {got}, wants {want}")


def _find_extents(
    call: Call, tensors: Sequence[tuple[Operand, Tensor]], exactly: bool, refuse: Callable[..., NoReturn]
) -> None:
    """Extents that no argument has told: where a dimension is one, and then where it is a multiple of one."""
    for operand, tensor in tensors:
        if operand.scales_rows_of or operand.dtype == "":
            continue
        if operand.any_shape:
            call.any_shape = tensor.shape if call.any_shape is None else call.any_shape
            continue
        if tensor.dim() != len(operand.shape):
            refuse(operand.name, f"shape {list(tensor.shape)}", f"{len(operand.shape)} dimensions")
        for extent, size in zip(operand.shape, tensor.shape, strict=True):
            if extent.name and extent.per == 1 and extent.more == 0 and (extent.times == 1 or not exactly):
                call.sizes.setdefault(extent.name, size // extent.times)


def _check_number(number: Number, value: float, call: Call, refuse: Callable[..., NoReturn]) -> None:
    if number.finite and not math.isfinite(value):
        refuse(number.name, value, "a finite number")
    most = call.sizes[number.most_of] if number.most_of else number.most
    if number.dtype == "integer" and not number.least <= value <= most:
        upper = " or more" if most == 2**63 - 1 else f" to {most}"
        refuse(number.name, value, f"{number.least}{upper}")


def _check_tensor(operand: Operand, tensor: Tensor, call: Call, refuse: Callable[..., NoReturn]) -> None:
    if tensor.device != call.first.device:
        refuse(operand.name, f"a tensor on {tensor.device}", f"one on {call.first.device}")
    if operand.dtype == "number" and call.number is None:
        if tensor.dtype not in _NUMBERS:
            refuse(operand.name, tensor.dtype, "torch.float32 or torch.bfloat16")
        call.number = tensor.dtype
    dtype = _dtype(operand, call)
    if dtype is not None and tensor.dtype != dtype:
        refuse(operand.name, tensor.dtype, dtype)
    if operand.any_shape:
        if tensor.shape != call.any_shape:
            refuse(operand.name, f"shape {list(tensor.shape)}", list(call.any_shape or ()))
    elif operand.scales_rows_of:
        rows = math.prod(extent.value(call.sizes) for extent in operand.shape[:-1])
        if tensor.numel() < 1 or rows % tensor.numel() != 0:
            refuse(operand.scales_rows_of, f"{tensor.numel()} scales of rows", f"a divisor of its {rows} rows")
    elif operand.dtype:
        _check_shape(operand, tensor, call, refuse)
    if operand.strided:
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            refuse(operand.name, f"strides {list(tensor.stride())}", "a last dimension that is contiguous")
    elif not tensor.is_contiguous():
        refuse(operand.name, f"strides {list(tensor.stride())}", "a contiguous tensor")


def _check_shape(operand: Operand, tensor: Tensor, call: Call, refuse: Callable[..., NoReturn]) -> None:
    wanted = [extent.value(call.sizes) for extent in operand.shape]
    for extent, size, want in zip(operand.shape, tensor.shape, wanted, strict=True):
        if want != -1 and size != want:
            shown = ", ".join("any" if want == -1 else str(want) for want in wanted)
            refuse(operand.name, f"shape {list(tensor.shape)}", f"[{shown}]")
        if size < extent.least:
            refuse(operand.name, f"shape {list(tensor.shape)}", f"at least one of {extent.name}")
        if extent.multiple_of and size % call.sizes[extent.multiple_of] != 0:
            of = f"the {call.sizes[extent.multiple_of]} {extent.multiple_of}"
            refuse(operand.name, f"{size} {extent.name}", f"a multiple of {of}")


def _check_workspace(workspace: Tensor, call: Call, refuse: Callable[..., NoReturn]) -> None:
    """Its size is of no interest without a kernel."""
    if workspace.dtype != torch.uint8 or workspace.dim() != 1 or not workspace.is_contiguous():
        got = f"shape {list(workspace.shape)} of {workspace.dtype}"
        refuse("workspace", got, "one contiguous dimension of torch.uint8")
    if workspace.device != call.first.device:
        refuse("workspace", f"a tensor on {workspace.device}", f"one on {call.first.device}")


def _dtype(operand: Operand, call: Call) -> torch.dtype | None:
    if operand.dtype == "number":
        return call.number
    found: torch.dtype | None = getattr(torch, operand.dtype) if operand.dtype else None
    return found


def new_outputs(name: str, call: Call, zeroed: bool = False) -> dict[str, Tensor]:
    """The outputs of a call that was checked."""
    made = {}
    for output in OPERATORS[name].outputs:
        any_shape = call.any_shape if output.any_shape else None
        shape = [extent.value(call.sizes) for extent in output.shape] if any_shape is None else list(any_shape)
        new = call.first.new_zeros if zeroed else call.first.new_empty
        made[output.name] = new(shape, dtype=_dtype(output, call))
    return made


def _without_data(name: str, *arguments: Any, **keywords: Any) -> Any:
    """What the operator returns, without its values."""
    call = check(name, arguments, keywords)
    outputs = OPERATORS[name].outputs
    if not outputs or outputs[0].name in keywords:
        return None
    made = tuple(new_outputs(name, call).values())
    return made[0] if len(made) == 1 else made


def workspace_bytes(name: str, *, bfloat16: bool, cuda: bool, **sizes: int) -> int:
    """Bytes of workspace of an operator; sizes by the names of its extents and numbers, 1 for an optional tensor that
    is given. 0 where there is no kernel or it takes no such sizes."""
    return _C.workspace(name, bfloat16=bfloat16, cuda=cuda, **sizes)


for _name, _described in OPERATORS.items():
    library.register_fake(f"dgemma::{_name}", partial(_without_data, _name))
    if _described.has_out:
        library.register_fake(f"dgemma::{_name}.out", partial(_without_data, _name))
