"""/v1/decisions: which of some choices answers a prompt, read in one denoising step."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from dgemma_ext.engine.decision import DecisionCanvas, decision_canvas, ids_read, label_ids
from dgemma_ext.serve import errors
from dgemma_ext.serve.call import Call
from dgemma_ext.serve.http import client_gone, finished, json_answer
from dgemma_ext.serve.job_runner import Submission
from dgemma_ext.serve.prompting import messages_by_roles, options_of
from dgemma_ext.serve.protocol.decisions import DecisionRequest, Decisions
from dgemma_ext.serve.routing import failures, service_of, stated
from dgemma_ext.serve.service import Service
from dgemma_ext.serve.steering import seeds_of
from dgemma_ext.serve.submissions import usual_limit
from dgemma_ext.serve.usage import usage_of

router = APIRouter()


@router.post("/v1/decisions", responses={200: {"model": Decisions}, **failures()})
async def create_decisions(body: DecisionRequest, request: Request) -> Response:
    """Decides between choices, with a probability for each."""
    service = service_of(request)
    name = service.check_model(body.model)
    prompts, field = await _prompts(service, body)
    options = options_of(None, None, body.chat_template_kwargs)
    vocabulary = service.model.config.vocab_size
    ids_of = await service.in_thread("choices", label_ids, body.choices, service.tokenizer, vocabulary)
    held = await _canvas(service, body)
    # Without a seed it is 0: the same question gets the same answer.
    seed = seeds_of(body.seed, temperature=0, count=1)[0]
    submissions = []
    for text_or_chat in prompts:
        prompt = await service.tokenized(text_or_chat, field, options)
        usual_limit(service, len(prompt), held.sampler, field)
        read = ids_read(ids_of)
        asked = (prompt, held.length, held.sampler, seed, held.canvas)
        submissions.append(Submission(*asked, logprob_token_ids=read, adapter=service.adapter_of(body.model)))
    call = service.begin(submissions)
    stated(request, call, body.messages if body.input is None else body.input)
    if not await finished(call, request):
        return client_gone()
    head = {
        "id": f"decision-{secrets.token_hex(12)}",
        "object": "decisions",
        "created": int(time.time()),
        "model": name,
        "system_fingerprint": service.fingerprint,
    }
    return json_answer({**head, "data": _data(call, held, ids_of), "usage": usage_of(call)})


async def _prompts(service: Service, body: DecisionRequest) -> tuple[list[Any], str]:
    """The prompts, and the field that they come from."""
    if (body.input is None) == (body.messages is None):
        raise errors.bad_request("either input or messages is wanted", "input")
    if body.messages is not None:
        messages = await service.with_images_read(body.messages, "messages", body.mm_processor_kwargs)
        return [messages_by_roles(messages, service.tokenizer)], "messages"
    texts = [body.input] if isinstance(body.input, str) else body.input or []
    if len(texts) > service.engine.capacity:
        raise errors.bad_request(f"input may have {service.engine.capacity} texts here, got {len(texts)}", "input")
    return list(texts), "input"


async def _canvas(service: Service, body: DecisionRequest) -> DecisionCanvas:
    longest = service.model.config.canvas_length
    if body.canvas_length is not None and body.canvas_length > longest:
        raise errors.bad_request(f"canvas_length must be at most {longest}, got {body.canvas_length}", "canvas_length")
    defaults, length = service.model.defaults, body.canvas_length
    return await service.in_thread(
        "template", decision_canvas, body.template, service.tokenizer, defaults, longest, length
    )


def _data(call: Call, held: DecisionCanvas, ids_of: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    decisions = [held.read(answer.logprobs, ids_of, sum(answer.denoising_steps)) for answer in call.answers]
    return [
        {
            "index": index,
            "choice": one.choice,
            "probabilities": one.probabilities,
            "mass": one.mass,
            "denoising_steps": one.steps,
        }
        for index, one in enumerate(decisions)
    ]
