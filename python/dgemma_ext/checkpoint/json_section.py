"""Reads a JSON file of a checkpoint field by field; every error names the field and the supported values."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgemma_ext import arguments
from dgemma_ext.checkpoint.file_faults import read_file
from dgemma_ext.errors import CheckpointError

# Sizes and token ids are int32 in the kernels.
LARGEST_INTEGER = arguments.INT32_END - 1

_KINDS = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}


def json_file(path: str | os.PathLike[str], name: str) -> Path:
    path = Path(arguments.path("path", path))
    return path / name if path.is_dir() else path


def read_json(file: Path) -> Any:
    """Parses a JSON file, in UTF-8 or in the encoding of its byte order mark; raises CheckpointError naming it."""
    raw = read_file(file)
    try:
        return json.loads(raw)
    except ValueError as error:  # bad characters and bad JSON
        raise CheckpointError(f"is not JSON: {error}", file=file) from error
    except RecursionError as error:
        raise CheckpointError("is not JSON that can be read: it is nested too deeply", file=file) from error


def read_object(file: Path) -> dict[str, Any]:
    """Parses a JSON file that holds one object; raises CheckpointError naming it."""
    values = read_json(file)
    if not isinstance(values, dict):
        raise CheckpointError(f"is {kind_of(values)}; wanted: an object", file=file)
    return values


def kind_of(value: Any) -> str:
    """The JSON kind of a value that is no object."""
    return "null" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


class Section:
    """One JSON object, with getters that name the field in every error."""

    def __init__(self, name: str, values: Any) -> None:
        if not (isinstance(values, Mapping) and all(isinstance(key, str) for key in values)):
            raise ValueError(f"{name or 'the configuration'} is {kind_of(values)}; wanted: an object")
        self.name = name
        self.values = values

    def path(self, field: str) -> str:
        return f"{self.name}.{field}" if self.name else field

    def error(self, field: str, wanted: str) -> ValueError:
        return ValueError(f"{self.path(field)} is {arguments.shown(self.values.get(field))}; supported: {wanted}")

    def get(self, field: str, default: Any = None) -> Any:
        return self.values.get(field, default)

    def integer(self, field: str, default: int | None = None, minimum: int = 1, maximum: int = LARGEST_INTEGER) -> int:
        value = self._present(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(field, f"an integer from {minimum} to {maximum:,}")
        return value

    def number(self, field: str, default: float | None = None, zero: bool = False) -> float:
        """A positive number, or one that may be zero as well."""
        value = self._present(field, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and (value >= 0 if zero else value > 0) and value <= sys.float_info.max):
            raise self.error(field, f"a finite number {'of at least' if zero else 'above'} 0.0")
        return float(value)

    def token_id(self, field: str, default: int | None = None) -> int | None:
        value = self.get(field, default)
        return None if value is None else self.integer(field, default, minimum=0)

    def token_ids(self, field: str, default: int | None = None) -> tuple[int, ...]:
        """A field that holds one id, a list of ids, or null."""
        value = self.get(field, default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= LARGEST_INTEGER for i in ids):
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
