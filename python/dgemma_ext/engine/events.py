"""Events of a request: a draft at every denoising step, a commit for every finished canvas, a failure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dgemma_ext.engine.request import Request


@dataclass(frozen=True)
class Draft:
    """The state of a canvas after a denoising step.

    step counts from 1 within the canvas. token_ids is the argmax canvas; accepted marks the positions that keep their
    sampled token for the next step (bool [L]); entropy is in nats (fp32 [L]).
    """

    request: Request
    canvas_index: int
    step: int
    token_ids: tuple[int, ...]
    accepted: torch.Tensor
    entropy: torch.Tensor
    mean_entropy: float

    @property
    def text(self) -> str:
        """The draft as text, without special tokens."""
        return self.request.decode(self.token_ids)


@dataclass(frozen=True)
class Commit:
    """A finished canvas: the ids that the answer keeps of it, and the text that they add.

    finish_reason is None while the answer goes on, else "eos" or "length".
    """

    request: Request
    canvas_index: int
    token_ids: tuple[int, ...]
    text: str
    denoising_steps: int
    finish_reason: str | None


@dataclass(frozen=True)
class Failure:
    """A request ended with an error; other requests go on."""

    request: Request
    error: Exception


Event = Draft | Commit | Failure
