"""The application: routes, what stands in front of them, and the answers to requests that fit none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.serve import chat, completions, decisions, errors, health, models, responses, tokens
from dgemma_ext.serve.access import guards
from dgemma_ext.serve.http import json_answer
from dgemma_ext.serve.logs import RequestLog
from dgemma_ext.serve.options import ServeOptions
from dgemma_ext.serve.page import routes as page
from dgemma_ext.serve.service import Service
from dgemma_ext.version import __version__


def build(model: DiffusionGemma, options: ServeOptions) -> FastAPI:
    """The application. `app.state.service` is what its routes share."""
    service = Service(model, options)
    app = FastAPI(
        title="dgemma_ext",
        version=__version__,
        summary="DiffusionGemma by OpenAI's interface",
        lifespan=_running,
        middleware=_middleware(service),
        redoc_url=None,
    )
    app.state.service = service
    for part in (chat, completions, responses, decisions, tokens, models, health, page):
        app.include_router(part.router)
    app.add_exception_handler(errors.ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RecursionError, _too_deep)
    _describe_failures(app)
    return app


@asynccontextmanager
async def _running(app: FastAPI) -> AsyncIterator[None]:
    """Runs the engine between startup and shutdown."""
    service: Service = app.state.service
    service.engine.start()
    service.is_started, service.is_draining = True, False
    try:
        yield
    finally:
        service.is_started, service.is_draining = False, True
        await service.engine.stop()


def _middleware(service: Service) -> list[Middleware]:
    """From the outside to the inside."""
    return [Middleware(RequestLog, service=service), *guards(service.options)]


async def _api_error(request: Request, error: Any) -> Response:
    return json_answer(error.body, error.status, error.headers)


async def _invalid(request: Request, error: Any) -> Response:
    """A body that its model refuses: status 400, the first fault in words, its field as `param`."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return await _api_error(request, errors.bad_request(f"the body is not JSON: {first['ctx']['error']}"))
    param = _name_of(place)
    return await _api_error(request, errors.bad_request(f"{param or 'the body'}: {first['msg']}", param))


async def _too_deep(request: Request, error: Any) -> Response:
    return await _api_error(request, errors.bad_request("the body has lists or objects too deep in each other"))


# What pydantic calls members of a union.
_TYPES = ("str", "int", "float", "bool", "dict", "list")


def _name_of(place: list[Any]) -> str | None:
    """messages[0].role, from pydantic's path; names of a union's members are left out."""
    name = ""
    for part in place:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part.islower() and part not in _TYPES:
            name += f".{part}" if name else part
    return name or None


async def _http_error(request: Request, error: Any) -> Response:
    """Of routing: no such path, no such method, or a body that could not be read, perhaps because of its limits."""
    if isinstance(error.__cause__, errors.ApiError):
        return await _api_error(request, error.__cause__)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = {
        404: f"there is no {request.method} {request.url.path!a} here",
        405: f"{request.url.path!a} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    return await _api_error(request, errors.ApiError(error.status_code, message, code=code, headers=headers))


def _describe_failures(app: FastAPI) -> None:
    """Leaves FastAPI's own form of a refused body out of the description: it is a 400 here."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = describe()
            for path in described["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                described["components"]["schemas"].pop(name, None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
