"""Events of a request: a draft at every denoising step, a commit for every finished canvas, a failure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dgemma_ext.engine.request import Request
from dgemma_ext.errors import GrammarError, NonFiniteError
from dgemma_ext.sampling import TokenLogprobs


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
    def end(self) -> int:
        """How many of token_ids the answer would keep: up to its first end of text, which is the last of them, or its
        length limit."""
        return len(self.request.kept_of_draft(self.canvas_index, self.token_ids))

    @property
    def text(self) -> str:
        """What the draft would add to the answer's text, which has no thoughts, tool calls and special tokens."""
        return self.request.words_of_draft(self.canvas_index, self.token_ids)[0]

    @property
    def thinking(self) -> str:
        """What the draft would add to the model's thoughts."""
        return self.request.words_of_draft(self.canvas_index, self.token_ids)[1]


@dataclass(frozen=True)
class Commit:
    """A finished canvas: the ids that the answer keeps of it, and what they add to its text and to its thoughts.

    finish_reason is None while the answer goes on, else "eos", "length" or "deadline". logprobs: one for each of
    token_ids, None where they were not asked for.
    """

    request: Request
    canvas_index: int
    token_ids: tuple[int, ...]
    text: str
    denoising_steps: int
    finish_reason: str | None
    thinking: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True)
class Failure:
    """A request ended with an error; other requests go on."""

    request: Request
    error: Exception


Event = Draft | Commit | Failure


def error_of(request: Request, error: Exception, step: int) -> Exception:
    """What a request that an exception ended tells its caller. step: the denoising step, 0 for the beginning."""
    if isinstance(error, FloatingPointError):  # of a check of a debug run, or of the step itself
        return NonFiniteError(str(error), request=request.number, step=step)
    if isinstance(error, GrammarError):
        return error
    failed = RuntimeError(f"a step was broken off: {error!r}")
    failed.__cause__ = error
    return failed
