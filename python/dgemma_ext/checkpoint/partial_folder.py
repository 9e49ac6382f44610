"""The folder OUT.partial of a conversion: one run writes it at a time, notes what is finished, and renames it last."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgemma_ext.checkpoint.json_section import read_object
from dgemma_ext.errors import CheckpointError

_STATE_FILE = "progress.json"


def check_destination(destination: Path) -> None:
    """Raises ValueError for a destination that exists; a link to nothing cannot be replaced by a folder either."""
    if os.path.lexists(destination):
        raise ValueError(f"OUT: {destination} exists; wants a folder that does not")


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs off it; the system frees the lock of a run that is killed.

    Raises ValueError where another run has it, CheckpointError where it cannot be made.
    """
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"OUT: another run writes {partial}; wants one at a time") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


class State:
    """The finished shards of a partial folder, kept in its progress.json."""

    def __init__(self, file: Path, fingerprint: str) -> None:
        self._file = file
        self._fingerprint = fingerprint
        self.done: dict[str, Any] = {}

    @classmethod
    def open(cls, partial: Path, fingerprint: str) -> State:
        """The state of an earlier run, or a new one. Raises ValueError for files of something else."""
        state = cls(partial / _STATE_FILE, fingerprint)
        if not state._file.exists():
            if any(partial.iterdir()):
                raise ValueError(f"OUT: {partial} has files of something else; wants it empty or away")
            state._save()  # so that the next run knows whose pieces are there
            return state
        earlier = read_object(state._file)
        if earlier.get("fingerprint") != fingerprint:
            raise ValueError(
                f"OUT: {partial} was begun from another source or for another format, calibration or adapter; "
                "remove it first"
            )
        state.done = earlier["done"]
        return state

    def finish(self, number: int, names: list[str], errors: list[dict[str, Any]]) -> None:
        self.done[str(number)] = {"names": names, "errors": errors}
        self._save()

    def index(self, partial: Path, count: int) -> dict[str, Any]:
        weight_map: dict[str, str] = {}
        for number in range(count):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            weight_map |= dict.fromkeys(self.done[str(number)]["names"], file)
        total = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
        return {"metadata": {"total_size": total}, "weight_map": weight_map}

    def errors(self) -> list[dict[str, Any]]:
        """The errors of all shards, in order."""
        return [error for number in sorted(self.done, key=int) for error in self.done[number]["errors"]]

    def rename(self, partial: Path, destination: Path) -> None:
        """Makes the finished folder the destination; where that fails, the next run finds it as it was."""
        with writing(partial):
            os.replace(partial, destination)
        (destination / _STATE_FILE).unlink()

    def _save(self) -> None:
        with writing(self._file):
            write_json(self._file, {"fingerprint": self._fingerprint, "done": self.done})


def write_json(file: Path, value: Any) -> None:
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, file)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"cannot be written: {reason}; what is finished is kept for the next run, and none of it loads", file=path
        ) from error
