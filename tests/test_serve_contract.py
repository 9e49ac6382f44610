"""The server keeps to its own OpenAPI description, whatever the requests: schemathesis makes them up.

`make contract` makes 1,000 cases and more; the suite a few for each operation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

import dgemma_ext as dg
from models import random_model
from serving import PATIENCE, Running, running

OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/fim/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/decisions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/page/facts"),
    ("GET", "/page/sudoku"),
]
CASES = int(os.environ.get("CONTRACT_CASES", "4"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A small model with tools; no canvas takes more than two steps, because the contract says nothing of texts."""
    model = random_model(
        layers=("sliding_attention", "full_attention"),
        hidden=16,
        intermediate=16,
        moe_intermediate=8,
        experts=2,
        top_k=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        global_head_dim=8,
        window=6,
        canvas=16,
        max_positions=512,
    )
    submit = dg.Scheduler.submit

    def short(self: dg.Scheduler, prompt: Any, limit: Any, sampler: Any, *more: Any, **named: Any) -> dg.Request:
        return submit(self, prompt, limit, replace(sampler, max_denoising_steps=2), *more, **named)

    with pytest.MonkeyPatch.context() as patch, running(model, max_waiting=120) as started:
        patch.setattr(dg.Scheduler, "submit", short)
        yield started


@pytest.fixture(scope="module")
def described(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (method, path, mode)
        for method, path in OPERATIONS
        for mode in GenerationMode
        if method == "POST" or mode is GenerationMode.POSITIVE  # where there is no body nothing can be wrong with it
    ],
)
def test_the_description_is_kept(method: str, path: str, mode: GenerationMode, described: Any) -> None:
    """Requests that fit the description, and requests that do not."""

    @given(case=described[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def keeps(case: Case) -> None:
        response = case.call(timeout=PATIENCE)
        case.validate_response(response, checks=CHECKS)

    keeps()


def test_every_operation_is_tried(described: Any) -> None:
    found = [result.ok() for result in described.get_all_operations()]
    assert {(one.method.upper(), one.path) for one in found} == set(OPERATIONS)


def test_nothing_is_left(server: Running) -> None:
    server.wait_until_empty()
