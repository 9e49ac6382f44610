"""What a request tells its caller on the way: a draft at every denoising step, a commit for every finished canvas."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dgemma_ext.engine.request import Request


@dataclass(frozen=True)
class Draft:
    """The state of a canvas after a denoising step.

    step counts from 1 within the canvas. token_ids is the argmax canvas; accepted says which positions kept their
    sampled token in this step (bool [L]); entropy is in nats per position (fp32 [L]).
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
    """A finished canvas: the ids that the answer keeps of it, and what they add to the text.

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
    """A request that ended with an error; the others go on."""

    request: Request
    error: Exception


Event = Draft | Commit | Failure
