"""/tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.serve import errors
from dgemma_ext.serve.http import json_answer
from dgemma_ext.serve.prompting import messages_by_roles, options_of
from dgemma_ext.serve.protocol.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from dgemma_ext.serve.routing import failures, service_of

router = APIRouter()


@router.post("/tokenize", responses={200: {"model": TokenizeResponse}, **failures(400, 401, 404, 408, 413, 500)})
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a text, or of a chat as a request of the same messages would have them."""
    service = service_of(request)
    service.check_model(body.model)
    tokenizer = service.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise errors.bad_request("either prompt or messages is wanted", "prompt")
    if body.messages is not None:
        options = options_of(body.tools, None, body.chat_template_kwargs)
        messages = await service.with_images_read(body.messages, "messages", body.mm_processor_kwargs)
        prompt = await service.tokenized(messages_by_roles(messages, service.tokenizer), "messages", options)
        ids = prompt.ids
    else:
        for field in ("tools", "chat_template_kwargs"):
            if getattr(body, field):
                raise errors.bad_request(f"{field} go through the chat template, and a prompt does not", field)
        add_bos = body.add_special_tokens and tokenizer.bos_token_id is not None
        ids = await service.in_thread("prompt", tokenizer.encode, body.prompt, add_bos)
    answer = {"count": len(ids), "max_model_len": service.longest, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = await service.in_thread("prompt", _texts, tokenizer, ids)
    return json_answer(answer)


def _texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([token], skip_special_tokens=False) for token in ids]


@router.post("/detokenize", responses={200: {"model": DetokenizeResponse}, **failures(400, 401, 404, 408, 413, 500)})
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids, special tokens spelled out."""
    service = service_of(request)
    service.check_model(body.model)
    text = await service.in_thread("tokens", service.tokenizer.decode, body.tokens, False)
    return json_answer({"prompt": text})
