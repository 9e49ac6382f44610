"""What a request tells its caller: a draft at every denoising step, a commit for every finished canvas, the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
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


@dataclass(frozen=True)
class Output:
    """A finished answer.

    token_ids: up to and with the first end-of-sequence token, at most max_new_tokens, no padding.
    denoising_steps: one number per canvas. tokens_per_forward: tokens kept / denoising steps.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    denoising_steps: tuple[int, ...]

    @property
    def tokens_per_forward(self) -> float:
        return len(self.token_ids) / sum(self.denoising_steps)
