"""/v1/responses: text in, text or typed events out."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from dgemma_ext.engine import Draft
from dgemma_ext.serve import errors
from dgemma_ext.serve.answer import Piece
from dgemma_ext.serve.call import Call
from dgemma_ext.serve.drafts import draft_fields
from dgemma_ext.serve.grammars import grammar_of
from dgemma_ext.serve.http import COMMENT, sent_event
from dgemma_ext.serve.prompting import messages_by_roles, options_of
from dgemma_ext.serve.protocol.common import stops_of
from dgemma_ext.serve.protocol.responses import ResponseObject, ResponsesRequest
from dgemma_ext.serve.reply import Reply, respond
from dgemma_ext.serve.response_input import messages_of, tools_of
from dgemma_ext.serve.response_output import Output
from dgemma_ext.serve.routing import failures, service_of
from dgemma_ext.serve.service import Service
from dgemma_ext.serve.submissions import submissions_of
from dgemma_ext.serve.tool_choice import tool_choice_of
from dgemma_ext.serve.usage import usage_of

router = APIRouter()


@router.post(
    "/v1/responses",
    responses={200: {"model": ResponseObject, "content": {"text/event-stream": {}}}, **failures()},
)
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answers text, or a conversation of items; nothing is stored, so each request brings all of it."""
    service = service_of(request)
    name = service.check_model(body.model)
    effort = None if body.reasoning is None else body.reasoning.effort
    tools = tool_choice_of(tools_of(body), body.tool_choice, body.parallel_tool_calls)
    options = options_of(tools.tools, effort, body.chat_template_kwargs)
    form, thinks = (body.text or {}).get("format"), options.enable_thinking
    grammar = await grammar_of(service, body, "text.format", form, tools, thinks)
    items: str | Sequence[Mapping[str, Any]] = body.input
    if not isinstance(items, str):
        items = await service.with_images_read(items, "input", body.mm_processor_kwargs)
    try:
        messages = messages_by_roles(messages_of(items, body.instructions), service.tokenizer)
        prompt = await service.tokenized(messages, "input", options)
    except errors.ApiError as error:  # a message has no place in this request: items became messages
        param = "input" if (error.param or "").startswith("messages") else error.param
        raise errors.bad_request(error.message, param, error.code) from error
    submissions = await submissions_of(service, body, [prompt], body.max_output_tokens, "input", grammar)
    call = service.begin(submissions, stops_of(body.stop), one_call=body.parallel_tool_calls is False)
    return await respond(request, call, _Reply(service, call, name, body), body, body.input)


class _Reply(Reply):
    """The answer of a call in the form of this interface."""

    def __init__(self, service: Service, call: Call, model: str, body: ResponsesRequest) -> None:
        self._service, self._call, self._body, self._model = service, call, body, model
        self._id = f"resp_{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._output = Output(self._id)
        self._number = 0

    def whole(self) -> dict[str, Any]:
        for piece in self._call.answers[0].pieces:
            for _ in self._output.add(piece):
                pass
        for _ in self._output.finish(self._is_cut):
            pass
        return self._response(self._status)

    async def events(self) -> AsyncIterator[bytes]:
        for state in ("created", "in_progress"):
            yield self._event({"type": f"response.{state}", "response": self._response("in_progress")})
        async for _, event in self._call.events():
            if isinstance(event, Draft):
                draft = draft_fields(event, self._call.answers[0], self._service.tokenizer)
                yield self._event({"type": "diffusion.draft", "diffusion": draft})
            elif isinstance(event, Piece):
                for one in self._output.add(event):
                    yield self._event(one)
            else:
                yield COMMENT
        for one in self._output.finish(self._is_cut):
            yield self._event(one)
        yield self._event({"type": f"response.{self._status}", "response": self._response(self._status)})

    def failed(self, error: errors.ApiError) -> bytes:
        """The events that end a stream whose answer failed."""
        failed = {**self._response("failed"), "error": {"code": "server_error", "message": error.message}}
        return self._event({"type": "response.failed", "response": failed})

    @property
    def _is_cut(self) -> bool:
        return self._call.answers[0].finish_reason == "length"

    @property
    def _status(self) -> str:
        return "incomplete" if self._is_cut else "completed"

    def _event(self, event: dict[str, Any]) -> bytes:
        numbered = {"type": event["type"], "sequence_number": self._number, **event}
        self._number += 1
        return sent_event(numbered, event["type"])

    def _response(self, status: str) -> dict[str, Any]:
        body = self._body
        is_done = status in ("completed", "incomplete")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": self._output.items if is_done else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"parameters": None, "strict": False, **tool} for tool in body.tools or []],
            "top_p": 1.0,
            "truncation": "disabled",
            "usage": self._usage() if is_done else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = usage_of(self._call)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
            "diffusion": usage["diffusion"],
        }
