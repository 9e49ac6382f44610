"""Ray Serve on this machine: two replicas of the bundled model behind the ingress. `make test-ray`; the tests of this
file are one story of one application, in order."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray has an environment of its own: make test-ray", allow_module_level=True)

import dgemma_ext as dg
import ray_cluster
from adapter_folders import random_tensors, write_adapter
from dgemma_ext import demo
from ray_cluster import Cluster, serve, wait
from serving import bundled

PUZZLES = [demo.draw(size=6, seed=seed).text for seed in range(8)]
STEPS = 12
# Every step is made, so that a signal finds requests under way.
SLOW = {"confidence_threshold": 0, "max_denoising_steps": STEPS}
ARGUMENTS = {
    "model": "6x6",
    "device": "cpu",
    "num_replicas": "2",
    "max_batch": "4",
    "max_waiting": "64",
    "served_model_names": "sudoku",
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), random_tensors(bundled().config, seed=5))


@pytest.fixture(scope="module")
def cluster(adapter: Path) -> Iterator[Cluster]:
    with ray_cluster.cluster() as found:
        deploy(adapters=json.dumps({"taught": str(adapter)}))
        wait(lambda: len(found.replicas) == 2)
        yield found


def deploy(**changes: Any) -> None:
    ray_cluster.deploy({name: value for name, value in {**ARGUMENTS, **changes}.items() if value is not None})


def asked(seed: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": PUZZLES[seed % len(PUZZLES)]}]
    return {"model": "sudoku", "messages": messages, "seed": seed, **fields}


@cache
def wanted(seed: int, steps: int | None = None) -> str:
    slow = {} if steps is None else {"confidence_threshold": 0, "max_denoising_steps": steps}
    sampler = dg.SamplerConfig(trim_canvas=True, **slow)
    return bundled().generate(asked(seed)["messages"], seed=seed, sampler=sampler).text


def events(answer: httpx2.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text(answer: httpx2.Response) -> str | None:
    """What a chat answered, or None for a stream that ended in an error."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return str(answer.json()["choices"][0]["message"]["content"])
    found = events(answer)
    if "error" in found[-1]:
        return None
    return "".join(choice["delta"].get("content") or "" for chunk in found for choice in chunk["choices"])


# The server's interface ----------------------------------------------------------------------------------------------


def test_answers_are_the_engine_s(cluster: Cluster) -> None:
    for seed in range(4):
        plain = cluster.chat(asked(seed))
        streamed = cluster.chat(asked(seed, stream=True, diffusion={"drafts": True}))
        assert plain.status_code == streamed.status_code == 200
        assert text(plain) == text(streamed) == wanted(seed)
        assert "event: diffusion.draft\n" in streamed.text
    assert cluster.gauge("dgemma_completion_tokens_total") == 2 * sum(
        len(bundled().generate(asked(seed)["messages"], seed=seed).token_ids) for seed in range(4)
    )


def test_errors_and_probes_are_the_server_s(cluster: Cluster) -> None:
    client = cluster.client
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/v1/models").json()["data"][0]["id"] == "sudoku"
    assert client.get("/").headers["content-type"].startswith("text/html")
    identified = client.get("/health", headers={"x-request-id": "mine"})
    assert identified.headers.get_list("x-request-id") == ["mine"]
    for answer, status, code in (
        (cluster.chat(asked(1), authorization="Bearer no"), 401, "invalid_api_key"),
        (cluster.chat(asked(1) | {"model": "other"}), 404, "model_not_found"),
        (client.post("/v1/chat/completions", content=b"x" * (9 << 20)), 413, "body_too_large"),
        (client.get("/nothing"), 404, "not_found"),
        (client.get("/v1/chat/completions"), 405, "method_not_allowed"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    refused = cluster.chat({"model": "sudoku", "messages": "no"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages"


def test_a_replica_has_the_adapters_that_it_was_told(cluster: Cluster, adapter: Path) -> None:
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), adapters={"taught": adapter})
    sampler = dg.SamplerConfig(trim_canvas=True, confidence_threshold=0, max_denoising_steps=STEPS)
    body = asked(2, diffusion=SLOW)
    alone = model.generate(body["messages"], seed=2, sampler=sampler, adapter="taught").text
    assert text(cluster.chat(body | {"model": "sudoku:taught"})) == alone != wanted(2, STEPS)
    assert text(cluster.chat(body)) == wanted(2, STEPS)
    assert cluster.chat(body | {"model": "sudoku:unknown"}).status_code == 404


def test_a_conversation_stays_with_its_replica(cluster: Cluster) -> None:
    """By its first message, by prompt_cache_key, or by x-session-id; and conversations are spread."""
    told = set()
    for seed in range(20):
        body = asked(1, user=f"user {seed}", max_tokens=8)
        turns = [*body["messages"], {"role": "assistant", "content": "62"}, {"role": "user", "content": f"{seed}"}]
        followed = [cluster.chat(body), cluster.chat(body | {"seed": 7}), cluster.chat(body | {"messages": turns})]
        assert {answer.status_code for answer in followed} == {200}
        (replica,) = {answer.headers["x-replica-id"] for answer in followed}
        told.add(replica)
        cached = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in followed]
        assert cached[1] > 0, "the prefix is not where the request went"
    assert told == cluster.replicas
    for field, header in (({"prompt_cache_key": "one"}, {}), ({}, {"x-session-id": "two"})):
        answers = [cluster.chat(asked(seed, max_tokens=8, **field), **header) for seed in range(8)]
        assert len({answer.headers["x-replica-id"] for answer in answers}) == 1


def test_a_full_replica_is_left_for_one_with_a_free_slot(cluster: Cluster) -> None:
    answers = cluster.chats([asked(1, prompt_cache_key="all", diffusion=SLOW) for _ in range(24)], at_once=12).answers()
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-replica-id"] for answer in answers} == cluster.replicas
    assert {text(answer) for answer in answers} == {wanted(1, STEPS)}


def test_a_client_that_leaves_frees_its_slot(cluster: Cluster) -> None:
    body = asked(3, stream=True, max_tokens=900, diffusion={"confidence_threshold": 0, "drafts": True})
    with cluster.client.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
        assert cluster.gauge("dgemma_requests_running") == 1
    wait(lambda: cluster.gauge("dgemma_requests_running") == 0)


# Bad luck ------------------------------------------------------------------------------------------------------------


def test_kill_9_of_a_replica_under_load(cluster: Cluster) -> None:
    """Its requests are asked again of the other one, or fail in so many words; all others are answered."""
    before = cluster.replicas
    losses = cluster.logged("a replica was lost")
    bodies = [asked(seed, stream=seed % 2 == 1, diffusion=SLOW) for seed in range(100)]
    asking = cluster.chats(bodies, at_once=12)
    wait(lambda: asking.done >= 20)
    victim = cluster.processes()[0]
    victim.send_signal(signal.SIGKILL)
    answers = asking.answers()
    refused = [answer for answer in answers if answer.status_code == 503]
    cut = [answer for answer in answers if answer.status_code == 200 and text(answer) is None]
    good = [seed for seed, answer in enumerate(answers) if answer.status_code == 200 and text(answer) is not None]
    lost = cluster.logged("a replica was lost") - losses
    print(f"{len(good)} answered, {lost} losses seen, {len(refused)} of status 503, {len(cut)} streams cut")
    assert len(good) + len(refused) + len(cut) == 100
    assert 1 <= lost <= 12  # what was under way there
    assert len(refused) + len(cut) <= lost
    for seed in good:
        assert text(answers[seed]) == wanted(seed, STEPS), seed
    for answer in refused:
        assert answer.json()["error"]["code"] == "replica_lost"
    wait(lambda: len(cluster.replicas) == 2 and cluster.running() == 2)
    assert len(cluster.replicas & before) == 1
    after = cluster.chats([asked(seed, user=f"{seed}") for seed in range(24)]).answers()
    assert {answer.headers["x-replica-id"] for answer in after} == cluster.replicas


def test_a_replica_whose_engine_has_stopped_is_replaced(cluster: Cluster) -> None:
    name = min(cluster.replicas)
    cluster.handle.broadcast("break_engine", name).results()
    bodies = [asked(seed, user=f"{seed}") for seed in range(24)]
    statuses = set()

    def is_replaced() -> bool:
        statuses.update(answer.status_code for answer in cluster.chats(bodies, at_once=2).answers())
        return name not in cluster.replicas and cluster.running() == 2

    wait(is_replaced)
    assert statuses == {200, 503}
    assert {answer.status_code for answer in cluster.chats(bodies).answers()} == {200}


# Ending --------------------------------------------------------------------------------------------------------------


def test_a_new_version_takes_over_without_a_lost_request(cluster: Cluster) -> None:
    """The replicas that it replaces finish what they have."""
    before = cluster.replicas
    asking = cluster.chats([asked(seed, diffusion=SLOW) for seed in range(48)], at_once=12)
    wait(lambda: asking.done >= 4)
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "metrics_interval_s": 1,
        "look_back_period_s": 2,
        "upscale_delay_s": 1,
    }
    deploy(num_replicas=None, autoscaling_config=json.dumps(scaling | {"downscale_delay_s": 5}))
    answers = asking.answers()
    assert {answer.status_code for answer in answers} == {200}
    assert [text(answer) for answer in answers] == [wanted(seed, STEPS) for seed in range(48)]
    wait(lambda: cluster.replicas and not cluster.replicas & before)
    wait(lambda: len(cluster.processes()) == cluster.running())


def test_replicas_come_when_requests_wait_and_go_when_few_are_left(cluster: Cluster) -> None:
    seeds = iter(range(100_000))

    def answered(at_once: int) -> bool:
        chosen = [next(seeds) % 100 for _ in range(2 * at_once)]
        answers = cluster.chats([asked(seed, diffusion=SLOW) for seed in chosen], at_once).answers()
        assert {answer.status_code for answer in answers} == {200}
        assert [text(answer) for answer in answers] == [wanted(seed, STEPS) for seed in chosen]
        return True

    wait(lambda: answered(12) and cluster.running() == 2)
    wait(lambda: answered(2) and cluster.running() == 1)


def test_deleting_the_application_drains_it(cluster: Cluster) -> None:
    """What waits for a slot is answered too."""
    wait(lambda: cluster.replicas)
    asking = cluster.chats([asked(seed, diffusion=SLOW) for seed in range(16)], at_once=16)
    wait(lambda: cluster.gauge("dgemma_requests_waiting") + cluster.gauge("dgemma_requests_running") >= 8)
    serve.delete("default")
    answers = asking.answers()
    assert {answer.status_code for answer in answers} == {200}
    assert [text(answer) for answer in answers] == [wanted(seed, STEPS) for seed in range(16)]
    wait(lambda: not cluster.processes())
