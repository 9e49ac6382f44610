"""Shared by the tests of the denoise step: the forms of the operators, and logits with all unread values poisoned."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from backend import BACKEND, DTYPES, FORMS  # noqa: F401  what the tests import with the rest
from dgemma_ext.ops import denoise
from dgemma_ext.ops.plain import denoise as denoise_plain
from reference import denoise as reference

NAN = float("nan")
# A raw op raises one or the other: before 2.13, torch keeps only the message of a C++ exception.
RAW_ERRORS = (RuntimeError, ValueError)


def use(form: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module whose functions are this form of the ops; both take the same named arguments."""
    if form == "plain":
        return denoise_plain
    if BACKEND == "cpu":
        monkeypatch.setenv("DGEMMA_CPU", form)
    return denoise


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Case:
    """Logits and their parameters. Raw logits of disallowed entries and of inactive requests are NaN."""

    logits: Tensor
    softcap: float
    temperature: Tensor
    active: Tensor | None = None
    allowed: Tensor | None = None
    allowed_row: Tensor | None = None

    @property
    def logits_params(self) -> dict[str, Any]:
        return {
            "logits": self.logits,
            "softcap": self.softcap,
            "temperature": self.temperature,
            "active": self.active,
            "allowed": self.allowed,
            "allowed_row": self.allowed_row,
        }

    @property
    def mask(self) -> Tensor:
        shape = (self.logits.shape[0], self.logits.shape[1], self.logits.shape[2])
        return reference.mask_of(self.allowed, self.allowed_row, shape)

    def exact(self) -> reference.Statistics:
        return reference.vocabulary_statistics(self.logits, self.softcap, self.temperature, self.mask)

    def request(self, b: int) -> Case:
        """One request by itself."""
        one = slice(b, b + 1)
        return Case(
            self.logits[one].contiguous(),
            self.softcap,
            self.temperature[one].contiguous(),
            None if self.active is None else self.active[one].contiguous(),
            self.allowed,
            None if self.allowed_row is None else self.allowed_row[one].contiguous(),
        )


def make_case(
    dtype: torch.dtype,
    batch: int = 2,
    length: int = 24,
    vocabulary: int = 1000,
    softcap: float = 30.0,
    spread: float = 4.0,
    masked: bool = False,
) -> Case:
    """Random logits. `masked`: the rows have index -1, a mask of one id, one with empty tiles, one of half the ids."""
    logits = (torch.randn(batch, length, vocabulary) * spread).to(dtype)
    temperature = torch.linspace(0.4, 0.8, batch)
    if not masked:
        return Case(logits, softcap, temperature)
    half = [v for v in range(vocabulary) if v % 2 == 1]
    allowed = denoise.pack_allowed([[vocabulary // 2], [0, 3, vocabulary - 1], half], vocabulary)
    allowed_row = torch.arange(batch * length, dtype=torch.int32).view(batch, length) % 4 - 1
    case = Case(logits, softcap, temperature, None, allowed, allowed_row)
    case.logits = torch.where(case.mask, logits, NAN).to(dtype)
    return case


def softmax_statistics(statistics: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The statistics that later operators take."""
    return dict(zip(("row_max", "row_sum", "tile_max", "tile_sum"), statistics[2:], strict=True))


def draws(batch: int, seed: int = 7) -> dict[str, Tensor]:
    """Seeds, canvas indices and steps that differ by request."""
    index = torch.arange(batch)
    return {
        "seed": index * (2**40 + 12345) - seed,
        "canvas_index": index.to(torch.int32) % 3,
        "step": index.to(torch.int32) % 5 + 1,
    }


def bits(tensor: Tensor) -> list[int]:
    """The bytes of tensors: equal for equal bits, NaN and signed zeros included."""
    return tensor.contiguous().flatten().view(torch.uint8).tolist()
