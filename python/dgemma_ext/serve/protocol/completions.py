"""/v1/completions and /v1/fim/completions: their requests and the answer that both give."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from dgemma_ext.sampling import MAX_LOGPROBS
from dgemma_ext.serve.protocol.chat import ToolCallMessage
from dgemma_ext.serve.protocol.common import (
    ChoiceDiffusion,
    Choices,
    Count,
    Format,
    GeneratingBody,
    Stops,
    StreamOptions,
    Usage,
)

Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]], Field(min_length=1)]
Prompts = Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]


class InsertionRequest(GeneratingBody):
    """Text to stand between a prompt and a suffix, as Mercury's clients ask for it."""

    prompt: str
    suffix: str | None = None
    max_tokens: Count | None = None
    stop: Stops = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS, strict=True)] | None = None
    response_format: Format = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @classmethod
    def refused(cls) -> dict[str, tuple[Any, ...]]:
        return {
            **super().refused(),
            "echo": (False,),
            "best_of": (1,),
        }


class CompletionRequest(InsertionRequest):
    """prompt: raw text, which goes through no chat template, or token ids; or several of one kind."""

    prompt: str | Prompts  # type: ignore[assignment]
    n: Choices = 1

    @property
    def choices(self) -> int:
        return self.n


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: TextLogprobs | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallMessage] | None = None
    diffusion: ChoiceDiffusion


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage
