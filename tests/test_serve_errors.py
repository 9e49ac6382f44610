"""Requests that cannot be served: their status, OpenAI's error object, the field that it names, and what is left."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from serving import MODEL, Running, bundled, running

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
QUICK = {"diffusion": {"max_denoising_steps": 1}}
KEY = "correct-horse"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(bundled(), body_timeout=1.0, max_body_bytes=1 << 20) as started:
        yield started


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(bundled(), api_key=KEY) as started:
        yield started


def post(server: Running, body: Any, path: str = "/v1/chat/completions", **settings: Any) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **settings.pop("headers", {})}
    return httpx2.post(server.url + path, content=content, headers=headers, timeout=60, **settings)


def error_of(response: httpx2.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    (only,) = response.json().items()
    assert only[0] == "error"
    error: dict[str, Any] = only[1]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": 3}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_completion_tokens": 2**31}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": "perhaps"}, "stream"),
        ({"top_p": 0.9}, "top_p"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),  # the template has no tools
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"structured_outputs": {"grammar": "root ::= a"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a(?=b)"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"top_k": 5}, "top_k"),
        ({"reasoning_effort": "immense"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"diffusion": {"t_min": 3.0}}, "diffusion.t_max"),
        ({"diffusion": {"canvas_length": 1000}}, "diffusion.canvas_length"),
        ({"diffusion": {"max_denoising_steps": 0}}, "diffusion.max_denoising_steps"),
        ({"diffusion": {"entropy_bound": "low"}}, "diffusion.entropy_bound"),
        ({"diffusion": {"speed": 3}}, "diffusion.speed"),
        ({"diffusion": {"drafts": True}}, "diffusion.drafts"),
        ({"diffusion": {"start_text": "1", "start_step": 100}}, "diffusion"),
        ({"diffusion": {"start_text": "1", "pinned": [[0, 9]]}}, "diffusion.pinned"),
        ({"diffusion": {"start_text": [{"blank": 2**20}] * 2}}, "diffusion.start_text"),
        ({"diffusion": {"start_text": "1" * 2000}}, "diffusion.start_text"),
        ({"diffusing": True}, "diffusing"),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_used_is_named(change: dict[str, Any], param: str, server: Running) -> None:
    response = post(server, CHAT | change)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert "/" not in error["message"].replace("http://", ""), "a path of the server's"


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [10**6]}, "prompt[0]"),
        ("completions", {"prompt": [-1]}, "prompt[0]"),
        ("completions", {"prompt": "\ud800"}, "prompt"),
        ("completions", {"prompt": ["1"] * 5000, "n": 128}, "prompt"),
        ("completions", {"prompt": ["1"] * 10, "n": 100}, "n"),
        ("completions", {"prompt": "1", "echo": True}, "echo"),
        ("completions", {"prompt": "1", "best_of": 3}, "best_of"),
        ("completions", {"prompt": "1", "logprobs": 30}, "logprobs"),
        ("completions", {"prompt": "1", "suffix": "2", "diffusion": {"start_text": "1"}}, "suffix"),
        ("fim/completions", {"suffix": "1"}, "prompt"),
        ("fim/completions", {"prompt": ["1"]}, "prompt"),
        ("responses", {"input": []}, "input"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ("responses", {"input": [{"type": "computer_call"}]}, "input[0].type"),
        ("responses", {"input": "1", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"input": "1", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ("responses", {"input": "1", "text": {"format": {"type": "xml"}}}, "text.format"),
        ("responses", {"input": "1", "background": True}, "background"),
    ],
    ids=str,
)
def test_fields_of_the_other_interfaces(path: str, change: dict[str, Any], param: str, server: Running) -> None:
    response = post(server, {"model": MODEL, **change}, f"/v1/{path}")
    assert response.status_code == 400, response.text
    assert (error_of(response)["param"] or "").split("[")[0] == param.split("[")[0]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b"3",
        b'{"messages": ' + b"[" * 5000,
        b"\xff\xfe{}",
        json.dumps(CHAT).encode() + b"}",
        json.dumps(CHAT | {"temperature": float("nan")}).encode(),
        json.dumps(CHAT).encode().replace(b"hi", b"\x00"),
        json.dumps(CHAT | {"seed": 1}).encode().replace(b": 1", b": " + b"9" * 5000),
    ],
    ids=range(10),
)
def test_bodies_that_are_no_request(body: bytes, server: Running) -> None:
    response = post(server, body)
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize("stream", [False, True])
def test_half_of_a_surrogate_pair_comes_back_as_it_was_sent(stream: bool, server: Running) -> None:
    metadata = {"\ud800": "\udfff"}
    asked = {"input": "1", "max_output_tokens": 4, "metadata": metadata, "stream": stream, **QUICK}
    response = post(server, asked, "/v1/responses")
    assert response.status_code == 200
    told = [json.loads(line[6:])["response"] for line in response.text.splitlines() if '"response":' in line]
    assert [one["metadata"] for one in told or [response.json()]] == [metadata] * (3 if stream else 1)
    refused = post(server, CHAT | {"structured_outputs": {"json": {"\ud800": 1}}})
    assert refused.status_code == 400
    assert "\ud800" in error_of(refused)["message"]


def test_a_body_that_is_too_deep(server: Running) -> None:
    """Python reads it, and code that walks it does not come to its end."""
    schema = b'{"const": ' + b"[" * 900 + b"]" * 900 + b"}"
    body = json.dumps(CHAT | {"structured_outputs": {"json": 0}}).encode().replace(b'"json": 0', b'"json": ' + schema)
    response = post(server, body)
    assert response.status_code == 400
    assert "too deep" in error_of(response)["message"]


def test_a_body_must_say_that_it_is_json(server: Running) -> None:
    """Other pages may send plain text anywhere without asking."""
    response = post(server, CHAT, headers={"content-type": "text/plain"})
    assert response.status_code == 400
    error_of(response)


def test_what_is_neutral_or_unknown_is_taken(server: Running) -> None:
    neutral = {
        "top_p": 1.0,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "n": 1,
        "stop": None,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "tools": None,
        "logprobs": False,
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "an_unknown_field": [1, 2],
        "temperature": 1,
        "top_k": -1,
    }
    response = post(server, CHAT | QUICK | neutral)
    assert response.status_code == 200, response.text


def test_control_characters_are_text(server: Running) -> None:
    messages = [{"role": "user", "content": "".join(map(chr, range(32))) + "\x7f\u2028\u202e"}]
    assert post(server, CHAT | QUICK | {"messages": messages}).status_code == 200


def test_a_prompt_that_is_too_long_is_told_both_numbers(server: Running) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1" * 2000}]}),
        ("/v1/completions", {"prompt": "1" * 2000}),
        ("/v1/responses", {"input": "1" * 2000}),
    ):
        error = error_of(post(server, body, path))
        assert error["code"] == "context_length_exceeded"
        assert "20" in error["message"]
        assert "987" in error["message"]  # a context of 1,024 less a canvas of 37
    error = error_of(post(server, CHAT | {"max_tokens": 5000}))
    assert error["code"] == "context_length_exceeded"
    assert "5000" in error["message"]
    assert "1024" in error["message"]


def test_an_unknown_model_path_and_method(server: Running) -> None:
    response = post(server, CHAT | {"model": "gpt-9"})
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("gpt-9")
    response = post(server, CHAT, "/v1/embeddings")
    assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
    response = httpx2.get(f"{server.url}/v1/chat/completions")
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_body_that_is_too_large(server: Running) -> None:
    response = post(server, b" " * 10_000_000)
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    headers = {"content-type": "application/json"}
    response = httpx2.post(f"{server.url}/v1/chat/completions", content=chunks(), headers=headers, timeout=60)
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
    assert post(server, CHAT | QUICK).status_code == 200


def exchange(server: Running, *parts: bytes, pause: float = 0.0) -> bytes:
    """What the server answers to raw bytes."""
    with socket.create_connection(server.address, timeout=30) as sock:
        for part in parts:
            try:
                sock.sendall(part)
            except OSError:
                break
            time.sleep(pause)
        answer = b""
        try:
            while piece := sock.recv(65536):
                answer += piece
                if b"\r\n\r\n" in answer and b"content-length: " in answer.lower():
                    head, _, body = answer.partition(b"\r\n\r\n")
                    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                    if len(body) >= length:
                        break
        except OSError:
            pass
        return answer


def test_a_body_that_never_arrives(server: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    began = time.monotonic()
    answer = exchange(server, head)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"body_timeout"' in answer
    assert 0.9 < time.monotonic() - began < 20


def test_a_head_that_never_arrives(server: Running) -> None:
    """Neither the first nor a second one on a connection; and a pause between two whole requests is no such thing."""
    whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    for before in (b"", whole):
        with socket.create_connection(server.address, timeout=30) as sock:
            sock.sendall(before + b"GET /health HTT")
            began, answer = time.monotonic(), b""
            while piece := sock.recv(65536):
                answer += piece
            assert 0.9 < time.monotonic() - began < 20
            assert answer.count(b"200 OK") == bool(before)
    with socket.create_connection(server.address, timeout=30) as sock:
        for _ in range(3):
            sock.sendall(whole)
            answer = b""
            while b"alive" not in answer:
                piece = sock.recv(65536)
                assert piece, "the connection was closed"
                answer += piece
            time.sleep(0.7)


def test_bombs_of_headers_and_bytes_that_are_no_http(server: Running) -> None:
    many = b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 200_000
    one = b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: " + b"a" * 1_000_000 + b"\r\n\r\n"
    for bomb in (many, one, b"\x16\x03\x01\x02\x00" * 100, b"GET\r\n\r\n"):
        answer = exchange(server, bomb)
        assert not answer or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert httpx2.get(f"{server.url}/health").status_code == 200


def test_request_ids(server: Running) -> None:
    given = httpx2.get(f"{server.url}/health", headers={"x-request-id": "abc-1:2"})
    assert given.headers["x-request-id"] == "abc-1:2"
    for odd in ("a b", "x" * 200, ""):
        response = httpx2.get(f"{server.url}/health", headers={"x-request-id": odd})
        assert response.headers["x-request-id"] not in (odd, "")
    failed = post(server, b"{", headers={"x-request-id": "bad-one"})
    assert failed.headers["x-request-id"] == "bad-one"


# Keys and origins -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "wrong", KEY[:-1], KEY + "x", "é"])
def test_a_wrong_key(key: str, locked: Running) -> None:
    headers = {"authorization": f"Bearer {key}".encode()} if key else {}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize")):
        response = httpx2.request(method, locked.url + path, headers=headers, json={} if method == "POST" else None)
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
        assert KEY not in response.text


def test_the_right_key(locked: Running) -> None:
    client = locked.client(api_key=KEY)
    assert client.chat.completions.create(**CHAT, extra_body=QUICK).choices
    with pytest.raises(openai.AuthenticationError):
        locked.client(api_key="wrong").models.list()
    for path in ("/health", "/ready", "/metrics"):
        assert httpx2.get(locked.url + path).status_code == 200


def test_pages_of_other_origins_may_not_call(server: Running) -> None:
    headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
    response = httpx2.options(f"{server.url}/v1/chat/completions", headers=headers)
    assert "access-control-allow-origin" not in response.headers
    with running(bundled(), cors_origins=["https://example.org"], api_key=KEY) as opened:
        response = httpx2.options(f"{opened.url}/v1/chat/completions", headers=headers)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://example.org"
        other = httpx2.get(f"{opened.url}/health", headers={"origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers


def test_nothing_is_left(server: Running, locked: Running) -> None:
    server.wait_until_empty()
    locked.wait_until_empty()
