"""The CUDA kernels of the denoise step in the test bed: the library and the structs of its C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from denoise_cases import Case
from sim.build import ROOT, sim_library

DENOISE = ROOT / "csrc" / "denoise"
SOURCES = [*sorted(DENOISE.rglob("*.cu")), *sorted((DENOISE / "cuda").glob("*.cpp"))]
SOURCES += [ROOT / "csrc" / "cuda" / "entry.cu", ROOT / "tests" / "sim" / "kernels" / "denoise_plan.cpp"]
# Seeds for the order in which the machine runs threads and completes copies and products.
SEEDS = [1, 2, 3]
GUARD = 256  # values behind each output
BFLOAT16 = 1
OK = 0
POINTER = ctypes.c_void_p


class Allowed(ctypes.Structure):
    """dgemma_allowed of csrc/include/dgemma/denoise.h."""

    _fields_ = [("mask", POINTER), ("rows", ctypes.c_int64), ("row_index", POINTER)]


class Logits(ctypes.Structure):
    """dgemma_logits."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "length", "vocabulary")]
        + [("dtype", ctypes.c_int), ("raw", POINTER), ("softcap", ctypes.c_float)]
        + [("temperature", POINTER), ("active", POINTER), ("allowed", Allowed)]
    )


class Statistics(ctypes.Structure):
    """dgemma_vocabulary_statistics."""

    _fields_ = (
        [("logits", Logits)]
        + [(name, POINTER) for name in ("argmax", "entropy", "row_max", "row_sum", "tile_max", "tile_sum")]
        + [("workspace", POINTER), ("workspace_bytes", ctypes.c_size_t)]
    )


class Head(ctypes.Structure):
    """dgemma_vocabulary_head of csrc/include/dgemma/vocabulary_head.h."""

    _fields_ = [("statistics", Statistics), ("hidden_size", ctypes.c_int64)]
    _fields_ += [(name, POINTER) for name in ("hidden", "embedding", "raw")]


class SoftEmbedding(ctypes.Structure):
    """dgemma_soft_embedding of csrc/include/dgemma/denoise.h."""

    _fields_ = (
        [("logits", Logits)]
        + [(name, POINTER) for name in ("row_max", "row_sum", "tile_max", "tile_sum", "pinned")]
        + [("hidden_size", ctypes.c_int64), ("embedding", POINTER)]
        + [(name, ctypes.c_float) for name in ("embedding_scale", "tolerance", "max_embedding_norm")]
        + [("output", POINTER), ("workspace", POINTER), ("workspace_bytes", ctypes.c_size_t)]
    )


class Cuda(ctypes.Structure):
    """dgemma_cuda of csrc/include/dgemma/base.h."""

    _fields_ = [("stream", POINTER), ("message", ctypes.c_char * 256)]


@cache
def library() -> ctypes.CDLL:
    built = sim_library("denoise", SOURCES)
    for name in ("vocabulary_statistics", "vocabulary_head", "soft_embedding"):
        getattr(built, f"dgemma_cuda_{name}_workspace").restype = ctypes.c_size_t
    for name in ("head_plan", "head_units"):
        getattr(built, name).restype = ctypes.c_char_p
    return built


@contextmanager
def machine(seed: int, capability: int = 90, multiprocessors: int = 3) -> Iterator[None]:
    """The GPU that the test bed plays, and its order of events."""
    library().sim_set_gpu(capability, multiprocessors)
    library().sim_set_seed(ctypes.c_uint64(seed))
    try:
        yield
    finally:
        library().sim_set_gpu(90, 3)


def sizes(batch: int, length: int, vocabulary: int) -> Logits:
    return Logits(batch, length, vocabulary, BFLOAT16)


def describe(case: Case) -> Logits:
    """Fills a struct with pointers into the case's tensors, which must outlive it."""

    def pointer(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    op = sizes(*case.logits.shape)
    op.raw, op.softcap = pointer(case.logits), case.softcap
    op.temperature, op.active = pointer(case.temperature), pointer(case.active)
    rows = 0 if case.allowed is None else len(case.allowed)
    op.allowed = Allowed(pointer(case.allowed), rows, pointer(case.allowed_row))
    return op


class Poisoned:
    """Tensors filled with 0xFF bytes, which are NaN, followed by more such bytes."""

    def __init__(self) -> None:
        self.whole: list[tuple[Tensor, int]] = []

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.full((count + GUARD,), 0xFF, dtype=torch.uint8)
        self.whole.append((raw, count))
        return raw[:count].view(dtype).view(shape)

    def assert_nothing_written_behind(self) -> None:
        for raw, count in self.whole:
            assert bool((raw[count:] == 0xFF).all()), "written behind the end"


def with_nan_behind(tensor: Tensor) -> Tensor:
    """A copy at the start of a tensor whose rest is NaN."""
    longer = torch.full((tensor.numel() + 128 * tensor.shape[-1],), float("nan"), dtype=tensor.dtype)
    longer[: tensor.numel()] = tensor.flatten()
    return longer[: tensor.numel()].view(tensor.shape)


def make_statistics(case: Case, poisoned: Poisoned) -> tuple[Statistics, tuple[Tensor, ...]]:
    """Makes poisoned outputs and workspace."""
    batch, length, vocabulary = case.logits.shape
    row, tile = (batch, length), (batch, length, -(-vocabulary // 128))
    dtypes = (torch.int32, torch.float32, torch.float32, torch.float64, torch.float32, torch.float32)
    parts = tuple(poisoned.tensor(s, t) for s, t in zip([row] * 4 + [tile] * 2, dtypes, strict=True))
    op = Statistics(describe(case), *(part.data_ptr() for part in parts))
    op.workspace_bytes = library().dgemma_cuda_vocabulary_statistics_workspace(ctypes.byref(op))
    workspace = poisoned.tensor((op.workspace_bytes,), torch.uint8)
    op.workspace = workspace.data_ptr()
    return op, parts


def statistics_of(case: Case) -> tuple[Tensor, ...]:
    """The statistics of stored logits by their own kernels: argmax, entropy, row_max, row_sum, tile_max, tile_sum."""
    poisoned, cuda = Poisoned(), Cuda()
    op, parts = make_statistics(case, poisoned)
    with machine(1):
        status = library().dgemma_cuda_vocabulary_statistics(ctypes.byref(op), ctypes.byref(cuda))
    assert status == OK, cuda.message.decode()
    return parts
