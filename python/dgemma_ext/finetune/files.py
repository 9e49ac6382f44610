"""What a run leaves in its folder, each file replaced whole: an adapter that PEFT and this package load, the state from
which a run is continued, and a log.

    adapter_config.json, adapter_model.safetensors    the adapter
    state.safetensors                                 factors, the optimizer's moments, counters: all that goes on
    log.jsonl                                         a line for each step and each evaluation

The state is one file, so a run that is killed at any moment has a whole one. The adapter is written after it, and made
anew from it when the run goes on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dgemma_ext.errors import CheckpointError
from dgemma_ext.finetune.adapter import TrainedAdapter

STATE_FILE, LOG_FILE = "state.safetensors", "log.jsonl"
ADAPTER_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_VERSION = 1
_PARTIAL = ".partial"
_MOMENTS = ("exp_avg", "exp_avg_sq")
# What a full disk and a full quota say, and a file that may not grow.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Progress:
    """Where a run is. step: optimizer steps made; epoch, drawn: examples drawn in this reading of the file; tokens:
    positions that the passes have read."""

    step: int = 0
    epoch: int = 0
    drawn: int = 0
    tokens: int = 0


def write_adapter(folder: Path, adapter: TrainedAdapter, base_model: str) -> None:
    """Writes the two files of a PEFT adapter."""
    write_whole(folder / ADAPTER_CONFIG_FILE, (json.dumps(adapter.peft_config(base_model), indent=2) + "\n").encode())
    write_whole(folder / ADAPTER_FILE, save(adapter.peft_tensors(), metadata={"format": "pt"}))


def write_state(
    folder: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    deciding: Mapping[str, Any],
) -> None:
    """Writes the state. deciding: what another run must have the same to go on with it, as JSON types."""
    tensors = {f"factor.{name}": tensor for name, tensor in parameters.items()}
    for name, tensor in parameters.items():
        moments = optimizer.state.get(tensor, {})
        tensors |= {f"{moment}.{name}": moments[moment] for moment in _MOMENTS if moment in moments}
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    notes = {"version": _VERSION, "progress": asdict(progress), "deciding": dict(deciding)}
    write_whole(folder / STATE_FILE, save(held, metadata={"finetune": json.dumps(notes)}))


def read_state(
    folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, deciding: Mapping[str, Any]
) -> Progress:
    """Puts a state into factors and optimizer. Raises CheckpointError for a file that is none, and ValueError naming
    the setting that differs."""
    file = folder / STATE_FILE
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            notes = json.loads((opened.metadata() or {})["finetune"])
            _compare(folder, notes["deciding"], json.loads(json.dumps(deciding)))
            step = float(notes["progress"]["step"])
            for name, tensor in parameters.items():
                tensor.data.copy_(opened.get_tensor(f"factor.{name}"))
                if step:
                    moments = {m: opened.get_tensor(f"{m}.{name}").to(tensor.device) for m in _MOMENTS}
                    count = torch.tensor(step, dtype=torch.float32, device="cpu")
                    optimizer.state[tensor] = {"step": count, **moments}
            return Progress(**notes["progress"])
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"is no state of a run: {error}", file=file) from error


def _compare(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> None:
    for name in sorted(stored.keys() | wanted.keys()):
        before, now = stored.get(name), wanted.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            _compare(folder, before, now, f"{path}{name}.")
        elif before != now:
            raise ValueError(f"the run in {folder} has {path}{name} {before!r}, and this one {now!r}")


def is_ours(name: str) -> bool:
    """Whether a run writes a file of this name."""
    whole = name.removesuffix(_PARTIAL)
    return whole in (STATE_FILE, LOG_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE)


def remove_partial(folder: Path) -> None:
    """Removes files that a killed run was writing."""
    for file in folder.iterdir():
        if file.name.endswith(_PARTIAL) and is_ours(file.name):
            file.unlink()


class Log:
    """log.jsonl: lines of steps and evaluations. A run that goes on drops the lines after its state."""

    def __init__(self, folder: Path, step: int) -> None:
        self._file = folder / LOG_FILE
        self.lines: list[dict[str, Any]] = []
        if step and self._file.exists():
            for text in self._file.read_bytes().splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # a line that was not written whole
                if line["step"] <= step:
                    self.lines.append(line)
        with naming(self._file):
            write_whole(self._file, b"".join(_line(line) for line in self.lines))

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with naming(self._file), self._file.open("ab") as out:
            out.write(_line(line))


def _line(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def write_whole(file: Path, content: bytes) -> None:
    """Replaces a file: whoever reads it sees the old content or the new, even after a crash. Raises CheckpointError
    naming it; the old one then stays."""
    partial = file.with_name(file.name + _PARTIAL)
    with naming(file):
        try:
            with partial.open("wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial, file)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        descriptor = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Makes an OSError a CheckpointError with the file's name."""
    try:
        yield
    except OSError as error:
        kept = f"; {STATE_FILE} holds what was written last" if error.errno in _NO_SPACE else ""
        raise CheckpointError(f"cannot be written: {error.strerror or error}{kept}", file=file) from error
