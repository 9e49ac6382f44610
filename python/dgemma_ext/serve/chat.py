"""/v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from dgemma_ext.checkpoint import ToolCall
from dgemma_ext.engine import Draft
from dgemma_ext.serve.answer import Answer, Piece, TextToken
from dgemma_ext.serve.call import Call
from dgemma_ext.serve.drafts import draft_fields, whole_text
from dgemma_ext.serve.grammars import grammar_of
from dgemma_ext.serve.http import COMMENT, DONE, sent_event
from dgemma_ext.serve.logprobs import chat_logprobs
from dgemma_ext.serve.prompting import messages_by_roles, options_of
from dgemma_ext.serve.protocol.chat import ChatCompletion, ChatRequest
from dgemma_ext.serve.protocol.common import stops_of
from dgemma_ext.serve.reply import Reply, respond
from dgemma_ext.serve.routing import failures, service_of
from dgemma_ext.serve.service import Service
from dgemma_ext.serve.submissions import submissions_of
from dgemma_ext.serve.tool_calls import call_id, tool_call
from dgemma_ext.serve.tool_choice import tool_choice_of
from dgemma_ext.serve.usage import choice_diffusion, usage_of

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    responses={200: {"model": ChatCompletion, "content": {"text/event-stream": {}}}, **failures()},
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answers a chat: whole, or as server-sent events with `stream`."""
    service = service_of(request)
    name = service.check_model(body.model)
    tools = tool_choice_of(body.tools, body.tool_choice, body.parallel_tool_calls)
    options = options_of(tools.tools, body.reasoning_effort, body.chat_template_kwargs)
    thinks = options.enable_thinking
    grammar = await grammar_of(service, body, "response_format", body.response_format, tools, thinks)
    messages = await service.with_images_read(body.messages, "messages", body.mm_processor_kwargs)
    prompt = await service.tokenized(messages_by_roles(messages, service.tokenizer), "messages", options)
    limit = body.max_completion_tokens or body.max_tokens
    submissions = await submissions_of(service, body, [prompt], limit, "messages", grammar)
    call = service.begin(submissions, stops_of(body.stop), one_call=body.parallel_tool_calls is False)
    return await respond(request, call, _Reply(service, call, name, body), body, body.messages)


class _Reply(Reply):
    """The answers of a call in the form of this interface."""

    def __init__(self, service: Service, call: Call, model: str, body: ChatRequest) -> None:
        self._service, self._call, self._body = service, call, body
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._head["system_fingerprint"] = service.fingerprint
        self._calls = [0] * len(call.answers)  # that chunks have told

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": self._message(index, answer),
                "logprobs": self._logprobs(answer.tokens),
                "finish_reason": answer.finish_reason,
                "diffusion": choice_diffusion(self._call, index),
            }
            for index, answer in enumerate(self._call.answers)
        ]
        return {"object": "chat.completion", **self._head, "choices": choices, "usage": usage_of(self._call)}

    async def events(self) -> AsyncIterator[bytes]:
        """The stream. A draft is a chunk whose delta is empty, so that a client that does not know it skips it."""
        options = self._body.stream_options
        has_usage = options is not None and options.include_usage
        usage = {"usage": None} if has_usage else {}
        for index in range(len(self._call.answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""}, **usage)
        async for index, event in self._call.events():
            if isinstance(event, Draft):
                if self._body.diffusing:
                    yield self._chunk(index, {"content": whole_text(self._call.answers[index], event)}, **usage)
                else:
                    draft = draft_fields(event, self._call.answers[index], self._service.tokenizer)
                    yield self._chunk(index, {}, "diffusion.draft", diffusion=draft, **usage)
            elif isinstance(event, Piece):
                deltas = self._deltas(index, event)
                for delta in deltas:
                    choice = {"logprobs": self._logprobs(event.tokens)} if "content" in delta else None
                    yield self._chunk(index, delta, choice=choice, **usage)
                if event.finish_reason is not None:
                    end = {"finish_reason": event.finish_reason, "diffusion": choice_diffusion(self._call, index)}
                    yield self._chunk(index, {}, choice=end, **usage)
            else:
                yield COMMENT
        if has_usage:
            yield self._event([], usage=usage_of(self._call))
        yield DONE

    def _logprobs(self, tokens: Sequence[TextToken]) -> dict[str, Any] | None:
        return chat_logprobs(tokens, self._service.tokenizer) if self._body.logprobs else None

    def _deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if piece.thinking:
            deltas.append({"reasoning_content": piece.thinking})
        if self._body.diffusing:
            deltas.append({"content": self._call.answers[index].text})
        elif piece.text:
            deltas.append({"content": piece.text})
        for call in piece.calls:
            number = self._calls[index]
            self._calls[index] += 1
            deltas.append({"tool_calls": [{"index": number, **self._tool_call(index, number, call)}]})
        return deltas

    def _message(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.thinking:
            message["reasoning_content"] = answer.thinking
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [self._tool_call(index, number, call) for number, call in enumerate(answer.calls)]
        return message

    def _tool_call(self, index: int, number: int, call: ToolCall) -> dict[str, Any]:
        return tool_call(call_id(str(self._head["id"]), index, number), call)

    def _chunk(
        self, index: int, delta: dict[str, Any], name: str | None = None, *, choice: Any = None, **more: Any
    ) -> bytes:
        fields = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **(choice or {})}
        return self._event([fields], name, **more)

    def _event(self, choices: list[Any], name: str | None = None, **more: Any) -> bytes:
        chunk = {"object": "chat.completion.chunk", **self._head, "choices": choices, **more}
        return sent_event(chunk, name)
