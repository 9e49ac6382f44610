"""/v1/responses: its request and its answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from dgemma_ext.serve.protocol.chat import Effort
from dgemma_ext.serve.protocol.common import Count, Flag, GeneratingBody, ImageSettings, Object, Stops, ToolChoice

# Items are checked where they become messages, and errors name what is wrong. This is for readers of the schema.
_ITEM = {
    "type": "object",
    "properties": {
        "type": {"enum": ["message", "function_call", "function_call_output", "reasoning"]},
        "role": {"enum": ["system", "developer", "user", "assistant"]},
    },
    "additionalProperties": True,
}
_TOOL = {
    "type": "object",
    "required": ["type", "name"],
    "properties": {
        "type": {"const": "function"},
        "name": {"type": "string"},
        "description": {"type": "string"},
        "parameters": {"type": "object"},
        "strict": {"type": ["boolean", "null"]},
    },
}
Item = Annotated[dict[str, Any], WithJsonSchema(_ITEM)]
Tool = Annotated[dict[str, Any], WithJsonSchema(_TOOL)]


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="allow")

    effort: Effort | None = None


class ResponsesRequest(GeneratingBody):
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: Flag | None = None
    reasoning: Reasoning | None = None
    text: Object | None = None
    metadata: Object | None = None
    stop: Stops = None
    chat_template_kwargs: Object | None = None
    mm_processor_kwargs: ImageSettings = None

    @classmethod
    def refused(cls) -> dict[str, tuple[Any, ...]]:
        return {
            **super().refused(),
            "previous_response_id": (),
            "conversation": (),
            "prompt": (),
            "background": (False,),
            "top_logprobs": (0,),
            "max_tool_calls": (),
        }


class InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    reasoning_tokens: int


class ResponsesUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    diffusion: Object


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ResponseObject(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: Object | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    metadata: Object
    model: str
    output: list[Object]
    parallel_tool_calls: bool
    temperature: float | None
    tool_choice: str | Object
    tools: list[Object]
    top_p: float | None
    usage: ResponsesUsage | None
