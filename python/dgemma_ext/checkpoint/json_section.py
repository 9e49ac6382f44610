"""Reads a JSON file of a checkpoint field by field; every error names the field and the supported values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgemma_ext.errors import CheckpointError


def json_file(path: str | os.PathLike[str], name: str) -> Path:
    path = Path(path)
    return path / name if path.is_dir() else path


def read_json(file: Path) -> Any:
    """Parses a JSON file; raises CheckpointError naming it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=file) from error
    except ValueError as error:  # bad UTF-8 and bad JSON
        raise CheckpointError(f"is not JSON: {error}", file=file) from error


class Section:
    """One JSON object, with getters that name the field in every error."""

    def __init__(self, name: str, values: Any) -> None:
        if not (isinstance(values, Mapping) and all(isinstance(key, str) for key in values)):
            raise ValueError(f"{name or 'the configuration'} must be an object, got {values!r}")
        self.name = name
        self.values = values

    def path(self, field: str) -> str:
        return f"{self.name}.{field}" if self.name else field

    def error(self, field: str, wanted: str) -> ValueError:
        return ValueError(f"{self.path(field)} is {self.values.get(field)!r}; supported: {wanted}")

    def get(self, field: str, default: Any = None) -> Any:
        return self.values.get(field, default)

    def integer(self, field: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._present(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(field, f"an integer of at least {minimum}")
        return value

    def number(self, field: str, default: float | None = None, zero: bool = False) -> float:
        """A positive number, or one that may be zero as well."""
        value = self._present(field, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and (value >= 0 if zero else value > 0) and value < float("inf")):
            raise self.error(field, f"a finite number {'of at least' if zero else 'above'} 0.0")
        return float(value)

    def token_id(self, field: str, default: int | None = None) -> int | None:
        value = self.get(field, default)
        return None if value is None else self.integer(field, default, minimum=0)

    def token_ids(self, field: str, default: int | None = None) -> tuple[int, ...]:
        """A field that holds one id, a list of ids, or null."""
        value = self.get(field, default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(field, "a token id or a list of token ids")
        return tuple(ids)

    def check_neutral(self, fields: Mapping[str, tuple[Any, ...]]) -> None:
        """Raises ValueError for a field that is present with none of the values listed for it."""
        for field, allowed in fields.items():
            if field in self.values and not any(self.values[field] is a or self.values[field] == a for a in allowed):
                raise self.error(field, " or ".join(json.dumps(a) for a in allowed) + " (or leave it out)")

    def _present(self, field: str, default: Any) -> Any:
        if field not in self.values and default is None:
            raise ValueError(f"{self.path(field)} is missing")
        return self.values.get(field, default)
