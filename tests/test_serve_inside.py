"""The application inside another program: mounted at a path, started by that program's lifespan, started again."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from dgemma_ext.serve import ServeOptions, build_app
from serving import MESSAGES, bundled

KEY = {"authorization": "Bearer hunter2"}
CHAT: dict[str, Any] = {"messages": MESSAGES, "diffusion": {"max_denoising_steps": 1}}
GUARDED = ("/v1/models", "/v1/chat/completions", "/tokenize", "/page/sudoku", "/nowhere", "/health/")


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return build_app(bundled(), ServeOptions(api_key="hunter2"))


@pytest.mark.parametrize("prefix", ["", "/llm", "/v1", "/llm/health"])
def test_the_key_is_wanted_wherever_the_application_is_mounted(prefix: str, app: FastAPI) -> None:
    outer = FastAPI(lifespan=lambda _: app.router.lifespan_context(app))
    outer.mount(prefix, app)
    with TestClient(outer, follow_redirects=False) as client:
        for path in ("/", "/health", "/ready", "/metrics", "/page/facts", "/page/page.js", "/openapi.json", "/docs"):
            assert client.get(prefix + path).status_code == 200, path
        for path in GUARDED:
            assert client.get(prefix + path).status_code == 401, path
        assert client.post(f"{prefix}/v1/chat/completions", json=CHAT).status_code == 401
        assert client.get(f"{prefix}/v1/models", headers=KEY).status_code == 200
        assert client.post(f"{prefix}/v1/chat/completions", json=CHAT, headers=KEY).status_code == 200


def test_without_its_lifespan_it_refuses_at_once() -> None:
    """A mounted application's lifespan is not run by the one around it."""
    outer = FastAPI()
    outer.mount("/llm", build_app(bundled()))
    with TestClient(outer) as client:
        answers = (
            client.get("/llm/ready"),
            client.post("/llm/v1/chat/completions", json=CHAT),
        )
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
