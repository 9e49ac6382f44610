"""Writes a safetensors file tensor by tensor, so that a run that is killed keeps what it has made.

Tensors are appended to FILE.pieces, and a line of FILE.journal says what was appended. Every few seconds both are
written through to the disk, the journal last: a line is there only where its tensors are. The next run takes up behind
the last whole line. `finish` gathers the pieces into the file.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from dgemma_ext.checkpoint.headers import ITEM_BYTES

# The most work in seconds that a killed run loses, beside the unit that it is at.
_FLUSH_SECONDS = 5.0
_COPY_BYTES = 1 << 24
_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class _Piece:
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class ShardWriter:
    """Writes one shard in units of work. `notes`: what was noted with each finished unit, of earlier runs too."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._payload_file, self._journal_file = (file.with_suffix(suffix) for suffix in (".pieces", ".journal"))
        self.notes: list[Any] = []
        self._pieces: list[_Piece] = []
        self._end = 0
        self._unwritten: list[str] = []
        self._flushed = time.monotonic()
        self._payload = open(self._payload_file, "ab")  # noqa: SIM115  closed by __exit__
        self._journal = open(self._journal_file, "ab")  # noqa: SIM115
        self._take_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is not None and not isinstance(error, OSError):
                self._flush()
        finally:
            self._payload.close()
            self._journal.close()

    def write(self, tensors: dict[str, Tensor], note: Any, dtype: str | None = None) -> None:
        """Appends the tensors of one unit. dtype: the format's name for it, where torch's does not tell."""
        pieces = []
        for name, tensor in tensors.items():
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            pieces.append(_Piece(name, dtype or _NAMES[tensor.dtype], tuple(tensor.shape), self._end, raw.numel()))
            self._payload.write(raw.numpy().data)
            self._end += raw.numel()
        self._pieces += pieces
        self.notes.append(note)
        entry = {"tensors": [[p.name, p.dtype, p.shape, p.nbytes] for p in pieces], "note": note}
        self._unwritten.append(json.dumps(entry) + "\n")
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._flush()

    def finish(self) -> list[str]:
        """Makes the file of all pieces, and returns the names of its tensors."""
        self._flush()
        # As the format's own writer does: with the larger elements first every tensor is aligned.
        pieces = sorted(self._pieces, key=lambda piece: (-ITEM_BYTES[piece.dtype], piece.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for piece in pieces:
            offsets = [end, end + piece.nbytes]
            header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": offsets}
            end += piece.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        unfinished = self._file.with_suffix(".unfinished")
        try:
            with unfinished.open("wb") as out, self._payload_file.open("rb") as payload:
                out.write(len(text).to_bytes(8, "little") + text)
                for piece in pieces:
                    payload.seek(piece.offset)
                    for begin in range(0, piece.nbytes, _COPY_BYTES):
                        out.write(payload.read(min(_COPY_BYTES, piece.nbytes - begin)))
                out.flush()
                os.fsync(out.fileno())
            os.replace(unfinished, self._file)
        finally:
            unfinished.unlink(missing_ok=True)
        return [piece.name for piece in pieces]

    @staticmethod
    def remove_pieces(file: Path) -> None:
        """Removes what a finished file was made of."""
        for suffix in (".pieces", ".journal"):
            file.with_suffix(suffix).unlink(missing_ok=True)

    def _take_up(self) -> None:
        """Reads the journal of an earlier run, and cuts off what came after its last whole line."""
        size = self._payload_file.stat().st_size
        journal = self._journal_file.read_bytes()
        kept = 0
        for line in journal.splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if entry is None or self._end + sum(tensor[3] for tensor in entry["tensors"]) > size:
                break
            for name, dtype, shape, nbytes in entry["tensors"]:
                self._pieces.append(_Piece(name, dtype, tuple(shape), self._end, nbytes))
                self._end += nbytes
            self.notes.append(entry["note"])
            kept += len(line)
        self._payload.truncate(self._end)
        self._journal.truncate(kept)

    def _flush(self) -> None:
        self._payload.flush()
        os.fsync(self._payload.fileno())
        self._journal.write("".join(self._unwritten).encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._unwritten.clear()
        self._flushed = time.monotonic()
