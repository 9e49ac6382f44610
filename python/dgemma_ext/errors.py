"""The errors of this package that a caller may want to catch by name."""

from __future__ import annotations

import os


class CheckpointError(Exception):
    """A checkpoint that cannot be used.

    `file` and `tensor` say where (`None` where the fault has no file or no tensor); the message names both.
    """

    file: str | None
    tensor: str | None

    def __init__(self, problem: str, *, file: str | os.PathLike[str] | None = None, tensor: str | None = None) -> None:
        self.file = None if file is None else os.fspath(file)
        self.tensor = tensor
        where = "".join(
            f"{part}: " for part in (self.file, None if tensor is None else f"tensor {tensor}") if part is not None
        )
        super().__init__(where + problem)


class NonFiniteError(RuntimeError):
    """A statistic of a denoising step turned NaN or infinite.

    `request` is the request's number within the call, `step` the denoising step, counted from 1.
    """

    request: int
    step: int

    def __init__(self, problem: str, *, request: int, step: int) -> None:
        self.request = request
        self.step = step
        super().__init__(f"request {request}, denoising step {step}: {problem}")
