"""The answer to a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dgemma_ext.checkpoint import InvalidToolCall, Response, ToolCall
from dgemma_ext.sampling import TokenLogprobs


@dataclass(frozen=True)
class Output:
    """A finished answer.

    text: for people; without thoughts, tool calls and special tokens. token_ids: up to and including the first
    end-of-sequence token, at most max_new_tokens, without padding. denoising_steps: one number per canvas. thinking:
    the model's thoughts. tool_calls: the functions that it calls; invalid_tool_calls: calls that cannot be read.
    tokens_per_forward: tokens kept / denoising steps. parsed: what an answer with a
    grammar says: the value of a JSON schema's, a list of (name, arguments) of tool calls, else the text. choices: of a
    dg.Choice, text → its score in the last step. logprobs: one
    for each of token_ids, None where they were not asked for. cached_tokens: how many tokens of the prompt came from a
    prefix cache.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    denoising_steps: tuple[int, ...]
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    parsed: Any = None
    choices: Mapping[str, float] | None = field(default=None, hash=False)
    cached_tokens: int = field(default=0, compare=False)  # the answer does not depend on it

    @property
    def tokens_per_forward(self) -> float:
        return len(self.token_ids) / sum(self.denoising_steps)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message for the history of a chat; its tool calls have the ids call_0, call_1, ..."""
        return Response(self.text, self.thinking, self.tool_calls).message
