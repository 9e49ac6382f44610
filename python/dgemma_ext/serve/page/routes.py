"""Serves the page's files, and tells the page what it shows of this server."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import Response

from dgemma_ext import demo
from dgemma_ext.serve.errors import ApiError
from dgemma_ext.serve.http import json_answer
from dgemma_ext.serve.routing import failures, service_of
from dgemma_ext.version import __version__

router = APIRouter()

_FOLDER = Path(__file__).parent
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/pictures.js": ("pictures.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
# Nothing inline, nothing from elsewhere, and no text that becomes markup: a browser then refuses what a model's answer
# could smuggle in even where the page has a fault.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # images of messages
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # A browser asks each time, and is told that nothing has changed: a new version of the package shows at once.
    "cache-control": "no-cache",
}


class Facts(BaseModel):
    """sudoku: the size of the grids that the model solves; null where it is no Sudoku model."""

    version: str
    needs_key: bool
    sudoku: int | None


class Sudoku(BaseModel):
    """A puzzle with one solution, both as a line row by row, "." where a cell is blank. seed: draws it again."""

    size: int
    seed: int
    puzzle: str
    solution: str


def _add_file(path: str, name: str, media_type: str) -> None:
    content = (_FOLDER / name).read_bytes()
    headers = {**_HEADERS, "etag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'}

    @router.get(path, include_in_schema=False)
    async def file(request: Request) -> Response:
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)


for _path, (_name, _type) in _FILES.items():
    _add_file(_path, _name, _type)


@router.get("/page/facts", responses={200: {"model": Facts}})
async def facts(request: Request) -> Response:
    """What the page must know before it has a key."""
    service = service_of(request)
    return json_answer(
        {"version": __version__, "needs_key": service.options.api_key is not None, "sudoku": _grid_size(request)}
    )


@router.get("/page/sudoku", responses={200: {"model": Sudoku}, **failures(400, 401, 404)})
def sudoku(request: Request, seed: Annotated[int | None, Query(ge=0, lt=2**53)] = None) -> Response:
    """A puzzle for the model, where it is one that solves them; made in a thread, because it takes a search."""
    size = _grid_size(request)
    if size is None:
        raise ApiError(404, "the model that is served here solves no Sudoku", code="not_found")
    seed = secrets.randbelow(2**31) if seed is None else seed
    puzzle = demo.draw(size, seed)
    return json_answer({"size": size, "seed": seed, "puzzle": puzzle.text, "solution": puzzle.solution})


def _grid_size(request: Request) -> int | None:
    """By the canvas, as the command's demo goes by it."""
    return demo.grid_size(service_of(request).model.config.canvas_length)
