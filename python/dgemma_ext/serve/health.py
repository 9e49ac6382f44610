"""/health, /ready and /metrics, for whatever watches the server."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.responses import Response

from dgemma_ext.serve import errors
from dgemma_ext.serve.http import json_answer
from dgemma_ext.serve.routing import failures, service_of

router = APIRouter()


class State(BaseModel):
    status: str


@router.get("/health", responses={200: {"model": State}, **failures(503)})
async def health(request: Request) -> Response:
    """Whether the process and its engine are alive."""
    if not service_of(request).engine.is_alive:
        raise errors.unavailable("the engine has stopped; the server must be started again", "engine_stopped")
    return json_answer({"status": "alive"})


@router.get("/ready", responses={200: {"model": State}, **failures(503)})
async def ready(request: Request) -> Response:
    """Whether the server takes new requests: the model is loaded and no signal has told it to end."""
    service = service_of(request)
    if not service.is_ready:
        raise errors.draining() if service.is_draining else errors.not_started()
    return json_answer({"status": "ready"})


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Counts and times for Prometheus."""
    return Response(generate_latest(service_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)
