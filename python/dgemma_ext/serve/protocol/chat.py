"""/v1/chat/completions: its request, its answer and the pieces of its stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from dgemma_ext.sampling import MAX_LOGPROBS
from dgemma_ext.serve import errors
from dgemma_ext.serve.protocol.common import (
    ChoiceDiffusion,
    Choices,
    Count,
    Flag,
    Format,
    GeneratingBody,
    ImageSettings,
    Object,
    Stops,
    StreamOptions,
    ToolChoice,
    Usage,
)

# The checkpoint's code checks messages and tools, and its errors name what is wrong. This is for readers of the schema.
_IMAGE = {
    "type": "object",
    "required": ["type", "image_url"],
    "properties": {
        "type": {"const": "image_url"},
        "image_url": {
            "type": "object",
            "required": ["url"],
            "properties": {
                "url": {"type": "string", "description": "A data URL: nothing is fetched."},
                "detail": {"enum": ["auto", "low", "high"], "description": "Changes nothing."},
            },
        },
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "anyOf": [
                            {
                                "type": "object",
                                "required": ["type", "text"],
                                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                            },
                            _IMAGE,
                        ]
                    },
                },
            ]
        },
    },
}
_TOOL = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string"},
                "description": {"type": "string"},
                "parameters": {"type": "object"},
                "strict": {"type": ["boolean", "null"]},
            },
        },
    },
}
Message = Annotated[dict[str, Any], WithJsonSchema(_MESSAGE)]
Tool = Annotated[dict[str, Any], WithJsonSchema(_TOOL)]
Effort = Literal["none", "instant", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(GeneratingBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: Stops = None
    n: Choices = 1
    logprobs: Flag | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS, strict=True)] | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: Flag | None = None
    response_format: Format = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: Object | None = None
    mm_processor_kwargs: ImageSettings = None

    @property
    def choices(self) -> int:
        return self.n

    @property
    def alternatives(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise errors.bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @classmethod
    def refused(cls) -> dict[str, tuple[Any, ...]]:
        return {
            **super().refused(),
            "functions": ([],),
            "function_call": ("none", "auto"),
            "modalities": (["text"],),
            "audio": (),
            "web_search_options": (),
            "continue_final_message": (False,),
        }


class Function(BaseModel):
    name: str
    arguments: str


class ToolCallMessage(BaseModel):
    id: str
    type: Literal["function"]
    function: Function


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallMessage] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    diffusion: ChoiceDiffusion


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
