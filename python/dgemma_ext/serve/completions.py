"""/v1/completions and /v1/fim/completions: raw text, and text between a prompt and a suffix."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from dgemma_ext.engine import Draft, TokenizedPrompt
from dgemma_ext.sampling import Canvas
from dgemma_ext.serve import errors
from dgemma_ext.serve.answer import Answer, Piece, TextToken
from dgemma_ext.serve.call import Call
from dgemma_ext.serve.drafts import draft_fields, whole_text
from dgemma_ext.serve.grammars import grammar_of
from dgemma_ext.serve.http import COMMENT, DONE, sent_event
from dgemma_ext.serve.job_runner import Submission
from dgemma_ext.serve.logprobs import text_logprobs
from dgemma_ext.serve.protocol.common import stops_of
from dgemma_ext.serve.protocol.completions import Completion, CompletionRequest, InsertionRequest
from dgemma_ext.serve.reply import Reply, respond
from dgemma_ext.serve.routing import failures, service_of
from dgemma_ext.serve.service import Service
from dgemma_ext.serve.submissions import submissions_of
from dgemma_ext.serve.tool_calls import call_id, tool_call
from dgemma_ext.serve.usage import choice_diffusion, usage_of

router = APIRouter()
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": Completion, "content": {"text/event-stream": {}}},
    **failures(),
}


@router.post("/v1/completions", responses=_ANSWERS)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Goes on with a text; with `suffix`, writes what stands between the two."""
    return await _complete(body, request)


@router.post("/v1/fim/completions", responses=_ANSWERS)
async def create_insertion(body: InsertionRequest, request: Request) -> Response:
    """Writes what stands between a prompt and a suffix."""
    return await _complete(body, request)


async def _complete(body: InsertionRequest, request: Request) -> Response:
    service = service_of(request)
    name = service.check_model(body.model)
    given = _prompts(body.prompt)
    service.engine.check_count(len(given), body.choices)
    prompts = [await _tokenized(service, prompt) for prompt in given]
    grammar = await grammar_of(service, body, "response_format", body.response_format)
    middle = None
    if body.suffix:
        if grammar is not None:
            raise errors.bad_request("suffix has no grammar; leave out what the answer must match", "suffix")
        if body.diffusion is not None and body.diffusion.start_text is not None:
            raise errors.bad_request("suffix and diffusion.start_text both say what the canvas holds", "suffix")
        suffix = await service.in_thread("suffix", service.tokenizer.encode, body.suffix)
        submissions = await submissions_of(service, body, prompts, 1, "prompt")
        middle, submissions = _insertions(service, submissions, suffix, body.max_tokens)
    else:
        submissions = await submissions_of(service, body, prompts, body.max_tokens, "prompt", grammar)
    call = service.begin(submissions, stops_of(body.stop), middle=middle)
    return await respond(request, call, _Reply(service, call, name, body), body, body.prompt)


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request, each a text or ids."""
    one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if one else list(prompt)


async def _tokenized(service: Service, prompt: str | list[int]) -> TokenizedPrompt:
    if isinstance(prompt, str):
        if not prompt:
            raise errors.bad_request("prompt is empty", "prompt")
        tokenizer = service.tokenizer
        ids = await service.in_thread("prompt", tokenizer.encode, prompt, tokenizer.bos_token_id is not None)
        return TokenizedPrompt(ids)
    return await service.tokenized(prompt, "prompt")


def _insertions(
    service: Service, submissions: list[Submission], suffix: list[int], max_tokens: int | None
) -> tuple[int, list[Submission]]:
    """The number of tokens to write, and the submissions with the suffix pinned behind them.

    Both lie in one canvas, because a canvas does not see the next one. Of a long suffix its beginning is pinned: as
    much as the canvas leaves room for, and at least half a canvas.
    """
    config = service.model.config
    sampler = submissions[0].sampler
    wanted = config.canvas_length if sampler is None or sampler.canvas_length is None else sampler.canvas_length
    length = min(wanted, config.canvas_length)
    room = length // 2 if max_tokens is None else max(length // 2, length - max_tokens)
    pinned = suffix[:room]
    middle = length - len(pinned) if max_tokens is None else min(max_tokens, length - len(pinned))
    if middle < 1:
        raise errors.bad_request(f"a canvas of {length} tokens has no room between prompt and suffix", "suffix")
    canvas = Canvas(tokens=[*[None] * middle, *pinned], pinned=[False] * middle + [True] * len(pinned))
    return middle, [replace(one, max_new_tokens=middle + len(pinned), canvas=canvas) for one in submissions]


class _Reply(Reply):
    """The answers of a call in the form of these interfaces."""

    def __init__(self, service: Service, call: Call, model: str, body: InsertionRequest) -> None:
        self._service, self._call, self._body = service, call, body
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": service.fingerprint,
        }

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": answer.text,
                "logprobs": self._logprobs(answer.tokens),
                **self._end(index, answer),
            }
            for index, answer in enumerate(self._call.answers)
        ]
        return {**self._head, "choices": choices, "usage": usage_of(self._call)}

    async def events(self) -> AsyncIterator[bytes]:
        options = self._body.stream_options
        has_usage = options is not None and options.include_usage
        usage = {"usage": None} if has_usage else {}
        async for index, event in self._call.events():
            answer = self._call.answers[index]
            if isinstance(event, Draft):
                if self._body.diffusing:
                    yield self._chunk(index, whole_text(answer, event), **usage)
                else:
                    draft = draft_fields(event, answer, self._service.tokenizer)
                    yield self._chunk(index, "", "diffusion.draft", diffusion=draft, **usage)
            elif isinstance(event, Piece):
                is_last = event.finish_reason is not None
                text = answer.text if self._body.diffusing else event.text
                if text or is_last:
                    choice = {"logprobs": self._logprobs(event.tokens)}
                    yield self._chunk(
                        index, text, choice=choice | (self._end(index, answer) if is_last else {}), **usage
                    )
            else:
                yield COMMENT
        if has_usage:
            yield sent_event({**self._head, "choices": [], "usage": usage_of(self._call)})
        yield DONE

    def _logprobs(self, tokens: Sequence[TextToken]) -> dict[str, Any] | None:
        return None if self._body.logprobs is None else text_logprobs(tokens, self._service.tokenizer)

    def _end(self, index: int, answer: Answer) -> dict[str, Any]:
        """What the last chunk of an answer, and a whole one, tell beside the text."""
        fields: dict[str, Any] = {
            "finish_reason": "length" if answer.finish_reason == "length" else "stop",
            "diffusion": choice_diffusion(self._call, index),
        }
        if answer.thinking:
            fields["reasoning_content"] = answer.thinking
        if answer.calls:
            ids = [call_id(str(self._head["id"]), index, number) for number in range(len(answer.calls))]
            fields["tool_calls"] = [tool_call(one, call) for one, call in zip(ids, answer.calls, strict=True)]
        return fields

    def _chunk(self, index: int, text: str, name: str | None = None, *, choice: Any = None, **more: Any) -> bytes:
        fields = {"index": index, "text": text, "logprobs": None, "finish_reason": None, **(choice or {})}
        return sent_event({**self._head, "choices": [fields], **more}, name)
