"""/v1/models."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from dgemma_ext.serve.http import json_answer
from dgemma_ext.serve.routing import failures, service_of
from dgemma_ext.serve.service import Service

router = APIRouter()


class Settings(BaseModel):
    """The sampler's settings where a request names none."""

    canvas_length: int
    max_denoising_steps: int
    entropy_bound: float
    t_min: float
    t_max: float
    stability_threshold: int
    confidence_threshold: float
    max_new_tokens: int


class Architecture(BaseModel):
    """What the model takes and gives, in OpenRouter's words."""

    input_modalities: list[Literal["text", "image"]]
    output_modalities: list[Literal["text"]]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parent: str | None
    architecture: Architecture
    diffusion: Settings


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


@router.get("/v1/models", responses={200: {"model": ModelList}, **failures(401)})
async def list_models(request: Request) -> Response:
    """The names that the model is served by, and NAME:ADAPTER for each adapter."""
    service = service_of(request)
    models = [_described(service, name) for name in service.adapters_by_model]
    return json_answer({"object": "list", "data": models})


@router.get("/v1/models/{model:path}", responses={200: {"model": Model}, **failures(400, 401, 404)})
async def retrieve_model(model: str, request: Request) -> Response:
    """The model by one of its names."""
    service = service_of(request)
    return json_answer(_described(service, service.check_model(model)))


def _described(service: Service, name: str) -> dict[str, Any]:
    config, defaults = service.model.config, service.model.defaults
    settings = {field: getattr(defaults, field) for field in Settings.model_fields if field != "canvas_length"}
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "dgemma_ext",
        "max_model_len": service.longest,
        "parent": None if name in service.options.served_model_names else service.name,
        "architecture": {
            "input_modalities": ["text"] if service.model.vision is None else ["text", "image"],
            "output_modalities": ["text"],
        },
        "diffusion": {"canvas_length": config.canvas_length, **settings},
    }
