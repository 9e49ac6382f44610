"""The answer to a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Output:
    """A finished answer.

    token_ids: up to and including the first end-of-sequence token, at most max_new_tokens, without padding.
    denoising_steps: one number per canvas. tokens_per_forward: tokens kept / denoising steps.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    denoising_steps: tuple[int, ...]

    @property
    def tokens_per_forward(self) -> float:
        return len(self.token_ids) / sum(self.denoising_steps)
