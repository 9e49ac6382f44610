"""A file of llama.cpp's format, GGUF: its metadata, and its tensors dequantized by the package gguf.

The package is the format's own (github.com/ggml-org/llama.cpp, gguf-py), and an extra of this one: it is imported where
a file of the format is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma_ext.checkpoint.file_faults import check_link, check_pointer, unreadable
from dgemma_ext.checkpoint.stored import TensorInfo
from dgemma_ext.errors import CheckpointError

SUFFIX = ".gguf"
# Values that are dequantized at a time: the package makes several copies of them in float32.
_PIECE = 1 << 22
_VERSIONS = (2, 3)
_NUMBERS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class GgufFile:
    """`metadata` by its keys, as Python's types; `tensors` by the names of the file, each with its type as dtype."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def package(file: Path) -> Any:
    """The module gguf; raises CheckpointError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "is a GGUF file, for which the package gguf is needed (pip install 'dgemma_ext[gguf]')", file=file
        ) from error
    return gguf


def read_gguf(file: Path) -> GgufFile:
    """Reads everything but the tensors' values.

    Raises CheckpointError, naming the file, for one that is no GGUF file, cut short or corrupt, one of several pieces,
    or has a tensor of a type that the package does not dequantize.
    """
    gguf = package(file)
    check_link(file)
    _check_start(file)
    try:
        reader = _checked_reader(gguf)(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise unreadable(file, error) from error
    # What the package raises depends on where its reading of a broken file ends.
    except (ValueError, LookupError, TypeError, OverflowError, MemoryError, ZeroDivisionError, RecursionError) as error:
        what = "has a tensor of an unknown type" if "GGMLQuantizationType" in str(error) else "is cut short or corrupt"
        raise CheckpointError(f"{what}: {error.args[0] if error.args else error}", file=file) from error
    pieces = metadata.get("split.count", 0)
    if pieces not in (0, 1):
        raise CheckpointError(f"is one of {pieces} pieces: merge them first (llama-gguf-split --merge)", file=file)
    if not reader.tensors:
        raise CheckpointError("has no tensors", file=file)
    found = {}
    end = int(reader.data_offset)
    for tensor in reader.tensors:
        shape = tuple(int(extent) for extent in reversed(tensor.shape.tolist()))
        kind = tensor.tensor_type.name
        info = TensorInfo(file, str(tensor.name), kind, shape, int(tensor.n_bytes), int(tensor.data_offset))
        _check_type(gguf, info)
        # As llama.cpp wants it: each behind the one before, from a multiple of the alignment on.
        if info.offset != end:
            raise CheckpointError(
                f"begins at byte {info.offset}, the one before it ends at {end}", file=file, tensor=info.name
            )
        end += -(-info.nbytes // int(reader.alignment)) * int(reader.alignment)
        found[info.name] = info
    return GgufFile(file, metadata, found)


def _check_start(file: Path) -> None:
    """Raises CheckpointError for what is no GGUF file, or one of a version or byte order that is not read."""
    if not file.is_file():
        raise CheckpointError("is no regular file", file=file)
    try:
        with file.open("rb") as stream:
            magic, version = stream.read(4), stream.read(4)
    except OSError as error:
        raise unreadable(file, error) from error
    check_pointer(file, magic + version)
    if magic != b"GGUF":
        raise CheckpointError("is no GGUF file: it does not begin with GGUF", file=file)
    if len(version) == 4 and int.from_bytes(version, "little") not in _VERSIONS:
        if int.from_bytes(version, "big") in _VERSIONS:
            raise CheckpointError("is big-endian; wanted: a little-endian GGUF file", file=file)
        found = int.from_bytes(version, "little")
        raise CheckpointError(
            f"is of version {found} of the format; wanted: {_VERSIONS[0]} or {_VERSIONS[1]}", file=file
        )


def _checked_reader(gguf: Any) -> Any:
    """The package's reader. Its own takes what is behind the file's end for empty: an array that is said to be long is
    then read for hours."""
    import numpy

    class Reader(gguf.GGUFReader):  # type: ignore[misc, unused-ignore]
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = int(offset) + int(count) * numpy.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"what begins at byte {offset} ends at byte {end} of {len(self.data)}")
            return super()._get(offset, dtype, count, override_order)

    return Reader


def _check_type(gguf: Any, info: TensorInfo) -> None:
    kind = gguf.GGMLQuantizationType[info.dtype]
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    columns = info.shape[-1] if info.shape else 1
    if columns % values:
        raise CheckpointError(
            f"has {columns} columns, no multiple of {info.dtype}'s {values}", file=info.file, tensor=info.name
        )
    if math.prod(info.shape) // values * nbytes != info.nbytes:  # the package's product of extents overflows
        raise CheckpointError(
            f"has {info.nbytes} bytes; {info.dtype} {list(info.shape)} takes another number",
            file=info.file,
            tensor=info.name,
        )
    if info.dtype in _NUMBERS:
        return
    try:
        gguf.dequantize(_zeros(nbytes), kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"is of type {info.dtype}, which the package gguf does not dequantize", file=info.file, tensor=info.name
        ) from error


def _zeros(nbytes: int) -> Any:
    import numpy

    return numpy.zeros((1, nbytes), dtype=numpy.uint8)


def read_tensor(info: TensorInfo) -> Tensor:
    """A tensor's values: BF16, F16 and F32 as they lie in the mapped file, of the other types in float32.

    Raises CheckpointError for a file that cannot be read or has become shorter.
    """
    import numpy

    try:
        mapped = numpy.memmap(info.file, dtype=numpy.uint8, mode="c", offset=info.offset, shape=(info.nbytes,))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", file=info.file, tensor=info.name) from error
    if info.dtype in _NUMBERS:
        return torch.from_numpy(mapped).view(_NUMBERS[info.dtype]).view(info.shape)
    result = torch.empty(info.shape, dtype=torch.float32, device="cpu")
    rows, columns = math.prod(info.shape[:-1]), info.shape[-1]
    flat, stored = result.view(rows, columns), mapped.reshape(rows, -1)
    gguf = package(info.file)
    for first, end in _runs(rows, max(1, _PIECE // columns)):
        values = gguf.dequantize(stored[first:end], gguf.GGMLQuantizationType[info.dtype])
        flat[first:end] = torch.from_numpy(values)
    return result


def _runs(count: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, step):
        yield first, min(first + step, count)
