"""/tokenize and /detokenize, by vLLM's names."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from dgemma_ext.serve.protocol.chat import Message, Tool
from dgemma_ext.serve.protocol.common import Body, Flag, ImageSettings, Object


class TokenizeRequest(Body):
    """A text or a chat. add_special_tokens: whether a text gets its begin-of-sequence token."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: Flag = True
    return_token_strs: Flag = False
    tools: list[Tool] | None = None
    chat_template_kwargs: Object | None = None
    mm_processor_kwargs: ImageSettings = None


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]]


class DetokenizeResponse(BaseModel):
    prompt: str
