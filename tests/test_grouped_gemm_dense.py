"""The dense projection on every instruction set of the machine, through the C interface."""

from __future__ import annotations

import ctypes
from functools import cache

import pytest
import torch
from torch import Tensor

from bounds import assert_close
from c_interface import VARIANTS, load
from reference import dense as reference

DTYPES = [torch.float32, torch.bfloat16]
OK, INVALID_ARGUMENT, UNSUPPORTED = 0, 1, 2
GUARD = 64  # values behind the output

PARALLEL_FOR = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int64, ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64), ctypes.c_void_p
)


class Dense(ctypes.Structure):
    """dgemma_dense of csrc/include/dgemma/grouped_gemm.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("rows", "in_features", "out_features")]
        + [("dtype", ctypes.c_int)]
        + [(name, ctypes.c_void_p) for name in ("input", "weight", "output", "workspace")]
        + [("workspace_bytes", ctypes.c_size_t)]
    )


class Cpu(ctypes.Structure):
    """dgemma_cpu of csrc/include/dgemma/base.h."""

    _fields_ = [
        ("parallel_for", PARALLEL_FOR),
        ("pool", ctypes.c_void_p),
        ("variant", ctypes.c_int),
        ("message", ctypes.c_char * 256),
    ]


@cache
def library() -> ctypes.CDLL:
    built = load()
    built.dgemma_cpu_dense_workspace.restype = ctypes.c_size_t
    return built


@PARALLEL_FOR
def backwards(_pool: int, tasks: int, task: ctypes._FuncPointer, state: int) -> None:
    for index in reversed(range(tasks)):
        task(state, index)


def describe(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> Dense:
    return Dense(rows, in_features, out_features, DTYPES.index(dtype))


def make(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Input and weight, each followed by NaN."""
    input = torch.full((rows + 1, in_features), float("nan"), dtype=dtype)
    input[:rows] = torch.randn(rows, in_features)
    weight = torch.full((out_features + 1, in_features), float("nan"), dtype=dtype)
    weight[:out_features] = torch.randn(out_features, in_features) / in_features**0.5
    return input[:rows], weight[:out_features]


def run(input: Tensor, weight: Tensor, variant: int, threads: bool = False) -> Tensor:
    """Runs a call into poisoned memory; skips where the machine lacks the instruction set."""
    rows, out_features = input.shape[0], weight.shape[0]
    op, cpu = describe(rows, input.shape[1], out_features, input.dtype), Cpu()
    cpu.variant = variant
    if threads:
        cpu.parallel_for = backwards
    out = torch.full((rows * out_features + GUARD,), float("nan"), dtype=input.dtype)
    op.input, op.weight, op.output = input.data_ptr(), weight.data_ptr(), out.data_ptr()
    assert library().dgemma_cpu_dense_workspace(ctypes.byref(op)) == 0
    status = library().dgemma_cpu_dense(ctypes.byref(op), ctypes.byref(cpu))
    if status == UNSUPPORTED:
        pytest.skip(cpu.message.decode())
    assert status == OK, cpu.message.decode()
    assert bool(out[rows * out_features :].isnan().all()), "written behind the output"
    return out[: rows * out_features].view(rows, out_features)


# rows, in_features, out_features
CASES = [(1, 64, 32), (5, 33, 7), (1, 1, 1), (16, 2816, 100), (150, 65, 51), (67, 128, 200), (3, 40, 97), (9, 7, 4)]


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_projection_is_right(case: tuple[int, int, int], dtype: torch.dtype, variant: int) -> None:
    input, weight = make(*case, dtype)
    output = run(input, weight, variant)
    assert_close(output, reference.dense(input, weight), dtype, reference.dense_rounded(input, weight))
    assert torch.equal(run(input, weight, variant, threads=True), output)


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_do_not_depend_on_the_others(dtype: torch.dtype, variant: int) -> None:
    input, weight = make(150, 333, 70, dtype)
    together = run(input, weight, variant)
    for rows in ([7], list(range(3, 70)), torch.randperm(150).tolist()):
        assert torch.equal(run(input[rows].contiguous(), weight, variant), together[rows])


@pytest.mark.parametrize(
    ("name", "value", "status", "message"),
    [
        ("rows", -1, INVALID_ARGUMENT, "rows: got -1, wants 0 to 2147483647"),
        ("in_features", 0, INVALID_ARGUMENT, "in_features: got 0, wants 1 to 2147483647"),
        ("out_features", 2**31, INVALID_ARGUMENT, "out_features: got 2147483648, wants 1 to 2147483647"),
        ("dtype", 7, UNSUPPORTED, "dtype: got 7, wants 0 (float32) or 1 (bfloat16)"),
        ("input", None, INVALID_ARGUMENT, "input: got NULL, wants a pointer"),
        ("weight", None, INVALID_ARGUMENT, "weight: got NULL, wants a pointer"),
        ("output", None, INVALID_ARGUMENT, "output: got NULL, wants a pointer"),
    ],
)
def test_bad_arguments(name: str, value: int | None, status: int, message: str) -> None:
    op, cpu = describe(4, 8, 8, torch.float32), Cpu()
    cpu.variant = -1
    for index, pointer in enumerate(("input", "weight", "output")):  # far from each other
        setattr(op, pointer, (index + 1) << 30)
    setattr(op, name, value)
    assert library().dgemma_cpu_dense(ctypes.byref(op), ctypes.byref(cpu)) == status
    assert cpu.message.decode() == message


def test_no_rows() -> None:
    op, cpu = describe(0, 8, 8, torch.float32), Cpu()
    cpu.variant = -1
    assert library().dgemma_cpu_dense(ctypes.byref(op), ctypes.byref(cpu)) == OK
