"""The errors of this package that a caller may want to catch by name."""

from __future__ import annotations

import os
from functools import partial
from typing import Any


class CheckpointError(Exception):
    """A checkpoint cannot be used.

    `file` and `tensor` are where the error is, or None; the message names both.
    """

    file: str | None
    tensor: str | None

    def __init__(self, message: str, *, file: str | os.PathLike[str] | None = None, tensor: str | None = None) -> None:
        self.message = message
        self.file = None if file is None else os.fspath(file)
        self.tensor = tensor
        where = (self.file, None if tensor is None else f"tensor {tensor}")
        super().__init__(": ".join(part for part in (*where, message) if part is not None))


class GrammarError(ValueError):
    """A grammar cannot be compiled, or not be followed.

    `pointer` is the JSON pointer of the part of a schema that is meant, `keyword` its keyword; or None.
    """

    pointer: str | None
    keyword: str | None

    def __init__(self, message: str, *, pointer: str | None = None, keyword: str | None = None) -> None:
        self.message = message
        self.pointer = pointer
        self.keyword = keyword
        where = (None if pointer is None else f"#{pointer}", keyword)
        super().__init__(": ".join(part for part in (*where, message) if part is not None))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), pointer=self.pointer, keyword=self.keyword), (self.message,)


class NonFiniteError(RuntimeError):
    """A statistic of a denoising step is NaN or infinite.

    `request` is the request's number within the call, `step` the denoising step, counted from 1.
    """

    request: int
    step: int

    def __init__(self, message: str, *, request: int, step: int) -> None:
        self.message = message
        self.request = request
        self.step = step
        super().__init__(f"request {request}, denoising step {step}: {message}")

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is copied by its positional arguments.
        return partial(type(self), request=self.request, step=self.step), (self.message,)
