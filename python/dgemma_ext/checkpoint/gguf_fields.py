"""Metadata of a GGUF file by their keys and kinds; every error names the file, the key, and what is wanted."""

from __future__ import annotations

from typing import Any

from dgemma_ext.checkpoint.gguf_file import GgufFile
from dgemma_ext.errors import CheckpointError


class Fields:
    """The metadata whose keys begin with `prefix`. Getters raise CheckpointError for what is missing or of another
    kind."""

    def __init__(self, file: GgufFile, prefix: str = "") -> None:
        self._file, self._prefix = file, prefix

    def get(self, key: str, default: Any = None) -> Any:
        return self._file.metadata.get(self._prefix + key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, "an integer")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(key, "a number")
        return float(plain(value))

    def entries(self, key: str, kind: type, wanted: str) -> list[Any]:
        """A list of one kind, which has entries."""
        value = self.get(key)
        if not isinstance(value, list) or not value or any(type(entry) is not kind for entry in value):
            raise self.error(key, wanted)
        return value

    def index(self, key: str, count: int) -> int | None:
        """A number below `count`; None where there is none."""
        if self.get(key) is None:
            return None
        value = self.integer(key)
        if not 0 <= value < count:
            raise self.error(key, f"an integer from 0 to {count - 1:,}")
        return value

    def check(self, key: str, *allowed: Any) -> None:
        """Raises CheckpointError for a value that is there and is none of these."""
        value = self.get(key)
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise self.error(key, " or ".join(str(one).lower() for one in allowed))

    def error(self, key: str, wanted: str) -> CheckpointError:
        got = self.get(key)
        state = "is missing" if got is None else f"is {str(got)[:60]}"
        return CheckpointError(f"{self._prefix}{key} {state}; wanted: {wanted}", file=self._file.path)


def plain(value: Any) -> Any:
    """A float32 as the shortest decimal that rounds to it: 0.1, not 0.10000000149; another value as it is."""
    if not isinstance(value, float):
        return value
    import numpy

    return float(str(numpy.float32(value)))
