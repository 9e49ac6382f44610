"""What an argument may be: an integer, a number, a flag, a sequence, a text or a path in Python's, numpy's or torch's
sense.

Every public function and class takes its arguments through these functions. What they return is plain Python; what they
refuse is a ValueError with the argument's name, what it wants and what it got.
"""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Iterable, Mapping, Set
from typing import Any, TypeVar

import numpy as np
import torch

Kind = TypeVar("Kind")

# The range of an int32, in which kernels take counts and ids.
INT32_END = 2**31
# The kernels take bounds and thresholds in fp32.
LARGEST_FP32 = torch.finfo(torch.float32).max

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlist = _repr.maxtuple = _repr.maxset = _repr.maxdict = 4


def refusal(name: str, wanted: str, got: Any) -> ValueError:
    """The error for an argument that cannot be used."""
    return ValueError(f"{name} must be {wanted}, got {shown(got)}")


def shown(value: Any) -> str:
    """A value in a few words, on one line."""
    if isinstance(value, torch.Tensor) and (value.dim() or value.is_meta):
        return f"a {value.device.type} tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, np.ndarray) and value.ndim:
        return f"an array {list(value.shape)} of {value.dtype}"
    text = " ".join(_repr.repr(value).split())
    # What is not a literal does not tell its type.
    return text if isinstance(value, int | float | str | bytes | None) else f"{text} ({type(value).__name__})"


# Single values --------------------------------------------------------------------------------------------------------


def integer(name: str, value: Any, least: int = 0, end: int = INT32_END, wanted: str = "an integer") -> int:
    """An integer in [least, end): whatever has an `__index__`, but no bool and no array of a dimension."""
    found = _index(value)
    if found is None or not least <= found < end:
        raise refusal(name, f"{wanted} in {_range(least, end)}", value)
    return found


def number(name: str, value: Any, zero: bool = True) -> float:
    """A finite number that fp32 can hold, above 0 or with `zero` 0 too; integers count."""
    found = _float(value)
    if found is None or not 0 <= found <= LARGEST_FP32 or (found == 0 and not zero):
        raise refusal(name, f"a finite number {'of at least' if zero else 'above'} 0", value)
    return found


def flag(name: str, value: Any) -> bool:
    """A bool, or 0 or 1, as masks are often written."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    found = int(value) if _is_bool_scalar(value) else _index(value)
    if found not in (0, 1):
        raise refusal(name, "True or False", value)
    return bool(found)


def text(name: str, value: Any) -> str:
    """A string that UTF-8 can hold: bytes that were not text become lone surrogates in command lines and files."""
    if not isinstance(value, str):
        raise refusal(name, "a string", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} must be text that UTF-8 can hold, got a lone surrogate, {value[error.start]!a}, at character "
                f"{error.start} (a byte that was not UTF-8?)"
            ) from error
    return str(value)


def path(name: str, value: Any) -> str:
    """A path: a string, bytes or an os.PathLike, with ~ as the home folder."""
    try:
        found = os.fsdecode(value)
    except Exception as error:
        raise refusal(name, "a path (a string, bytes or an os.PathLike)", value) from error
    if not found or "\0" in found:
        raise refusal(name, "a path", value)
    return os.path.expanduser(found)


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of some strings."""
    names = list(choices)
    if not isinstance(value, str) or value not in names:
        raise refusal(name, f"one of {', '.join(names)}", value)
    return str(value)


def instance(name: str, value: Any, kind: type[Kind], wanted: str) -> Kind:
    """An object of a class, which `wanted` names."""
    if not isinstance(value, kind):
        raise refusal(name, wanted, value)
    return value


# Sequences ------------------------------------------------------------------------------------------------------------


def is_sequence(value: Any) -> bool:
    """Whether a value has entries in an order: no text, no bytes, no mapping, no set, no array without a dimension."""
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping | type):
        return False
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.ndim > 0
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def sequence(name: str, value: Any, wanted: str, unordered: bool = False) -> list[Any]:
    """The entries of a sequence, which `wanted` names; with `unordered` of a set too.

    Those of an array or a tensor are Python's own numbers, or nested lists of them.
    """
    if is_sequence(value) or (unordered and isinstance(value, Set)):
        try:
            # Arrays of other kinds (times, strings) have entries that their tolist() turns into integers.
            plain = isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "iub")
            return list(value.tolist() if plain else value)
        except Exception as error:  # a meta tensor has no entries, and a class of the caller's can raise anything
            raise refusal(name, wanted, value) from error
    raise refusal(name, wanted, value)


def integers(
    name: str,
    value: Any,
    wanted: str,
    least: int = 0,
    end: int = INT32_END,
    unordered: bool = False,
    entry: str = "an integer",
) -> list[int]:
    """A sequence of integers in [least, end). `wanted` names the sequence, `entry` one of them."""
    entries = sequence(name, value, wanted, unordered)
    for position, found in enumerate(entries):
        if type(found) is not int or not least <= found < end:
            entries[position] = integer(f"{name}[{position}]", found, least, end, entry)
    return entries


def integer_matrix(name: str, value: Any, wanted: str) -> torch.Tensor:
    """An int64 tensor of two dimensions: from a tensor, on its device, an array, or lists of one length."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 2 or value.is_meta or value.dtype not in _INTEGERS:
            raise refusal(name, wanted, value)
        return value.long()
    rows = [integers(name, row, wanted, least=-(2**63), end=2**63) for row in sequence(name, value, wanted)]
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise refusal(name, f"{wanted}, rows of one length", value)
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


# ----------------------------------------------------------------------------------------------------------------------


def _index(value: Any) -> int | None:
    """operator.index(value), or None where that is not an integer."""
    if type(value) is int:
        return value
    # Python lets a bool be an integer, and torch a tensor of bools or of one entry.
    if isinstance(value, bool) or _is_bool_scalar(value) or (isinstance(value, torch.Tensor) and value.ndim):
        return None
    try:
        return operator.index(value)
    except Exception:  # a meta tensor's is a RuntimeError, and a class of the caller's can raise anything
        return None


def _float(value: Any) -> float | None:
    """float(value), or None where that is not a real number; NaN is one."""
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value[()]
    if isinstance(value, np.generic) and not isinstance(value, np.integer | np.floating):
        return None
    if isinstance(value, str | bool | np.timedelta64 | np.ndarray) or _is_bool_scalar(value):
        return None
    if isinstance(value, torch.Tensor) and value.ndim:
        return None
    if not any(hasattr(type(value), method) for method in ("__float__", "__index__")):
        return None
    try:
        return float(value)
    except Exception:  # an integer too large for a float, a complex tensor, a meta tensor
        return None


def _is_bool_scalar(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and value.dtype == torch.bool and not value.is_meta
    return isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind == "b"


def _range(least: int, end: int) -> str:
    return f"[{least}, {f'2**{end.bit_length() - 1}' if end.bit_count() == 1 and end >= 2**31 else end})"
