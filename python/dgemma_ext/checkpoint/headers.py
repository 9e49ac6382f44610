"""Reads the header of a safetensors file and checks it against the file's size.

The format: eight bytes of little-endian header length, that many bytes of JSON, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from dgemma_ext.checkpoint.file_faults import check_link, check_pointer, unreadable
from dgemma_ext.checkpoint.stored import FLOAT_DTYPES, TensorInfo
from dgemma_ext.errors import CheckpointError

# Bytes per element of every dtype that the safetensors format names (sub-byte ones are not listed).
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
# The largest header that the safetensors library reads.
_MAX_HEADER_BYTES = 100_000_000
# torch's limit of dimensions, and the largest size and offset of the format, which has 64 bits for them.
_MAX_DIMENSIONS = 64
_LARGEST_SIZE = 2**63 - 1


def read_header(file: Path) -> dict[str, TensorInfo]:
    """One file's tensors in the order of their bytes.

    Raises CheckpointError, naming file and tensor, for a header that is corrupt or does not fit the file's size. No
    more than the header is read, whatever length the file claims for it.
    """
    check_link(file)
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            check_pointer(file, start + stream.read(64))
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"is cut short or corrupt: a header of {length} bytes in {size}", file=file)
            stream.seek(8)
            raw = stream.read(length)
    except OSError as error:
        raise unreadable(file, error) from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise CheckpointError(f"has a corrupt header: {error}", file=file) from error
    except RecursionError as error:
        raise CheckpointError("has a corrupt header: it is nested too deeply", file=file) from error
    if not isinstance(header, dict):
        raise CheckpointError("has a corrupt header: not an object", file=file)
    header.pop("__metadata__", None)

    payload = size - 8 - length
    entries = sorted(
        ((name, *_read_entry(file, name, entry)) for name, entry in header.items()), key=lambda entry: entry[3:]
    )
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for name, dtype, shape, begin, tensor_end in entries:
        if begin != end:
            raise CheckpointError(f"begins at byte {begin}, the one before it ends at {end}", file=file, tensor=name)
        end = tensor_end
        if end > payload:
            raise CheckpointError(f"is cut short: it ends at byte {end} of {payload}", file=file, tensor=name)
        tensors[name] = TensorInfo(file, name, dtype, shape, nbytes=end - begin, offset=8 + length + begin)
    if end != payload:
        raise CheckpointError(f"has {payload - end} bytes after its last tensor", file=file)
    return tensors


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{next(name for name in counts if counts[name] > 1)} is listed twice")
    return result


def _read_entry(file: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """A header entry as dtype, shape, begin and end, checked against each other."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError("has a corrupt header entry", file=file, tensor=name)
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"has dtype {dtype[:20]}; supported: {', '.join(FLOAT_DTYPES)}", file=file, tensor=name)
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(f"has {end - begin} bytes; {dtype} {shape} takes another number", file=file, tensor=name)
    return dtype, tuple(shape), begin, end


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= _MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value <= _LARGEST_SIZE for value in values)
    )
