"""What the application of Ray Serve is made from, as far as it needs no Ray; and the examples of docs/serving.md."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
from typing import Any

import pytest
import yaml

import dgemma_ext as dg
import dgemma_ext.integrations.ray as integration
from dgemma_ext.cli.arguments import build_parser
from dgemma_ext.integrations.ray.conversation import session_of
from dgemma_ext.integrations.ray.replica_metrics import merged
from dgemma_ext.integrations.ray.settings import RaySettings
from dgemma_ext.serve import ServeOptions
from pages import ROOT

EXAMPLES = ROOT / "examples" / "serving"
PUZZLE = "62..14...62.4.23653.5.42..1.5654.23."


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


# Conversations -------------------------------------------------------------------------------------------------------


def session(body: Any, header: str | None = None) -> str:
    return session_of(header, json.dumps(body).encode())


def test_later_turns_are_the_same_conversation() -> None:
    begun = [said("system", "Be brief."), said("user", "Hello")]
    later = [*begun, said("assistant", "Hi"), said("user", "And now?")]
    assert session({"messages": begun}) == session({"messages": later, "seed": 3, "stream": True}) != ""
    items = [said("user", [{"type": "input_text", "text": "Hello"}])]
    assert session({"input": items}) == session({"input": [*items, said("assistant", "Hi"), said("user", "?")]}) != ""


def test_other_conversations_are_told_apart() -> None:
    bodies: list[Any] = [
        {"messages": [said("user", "Hello")]},
        {"messages": [said("user", "Hello there")]},
        {"messages": [said("system", "Be brief."), said("user", "Hello")]},
        {"messages": [said("user", "Hello")], "user": "somebody"},
        {"messages": [said("user", "Hello")], "prompt_cache_key": "one"},
        {"input": "Hello"},
        {"input": "Hello", "instructions": "Be brief."},
        {"prompt": "Hel"},
        {"prompt": [1, 2, 3]},
        {"prompt": [1, 2, 4]},
    ]
    assert len({session(body) for body in bodies}) == len(bodies)


def test_the_header_goes_before_the_key_and_the_key_before_the_messages() -> None:
    body = {"messages": [said("user", "Hello")], "prompt_cache_key": "one"}
    assert session(body, "mine") == "mine"
    assert session(body) == session({"messages": [said("user", "Other")], "prompt_cache_key": "one"})


def test_a_long_prompt_is_known_by_its_beginning() -> None:
    assert session({"prompt": "a" * 600}) == session({"prompt": "a" * 600 + "b"}) != session({"prompt": "b" * 600})
    assert session({"prompt": [1] * 600}) == session({"prompt": [1] * 600 + [2]})


@pytest.mark.parametrize(
    "body",
    [b"", b"no json", b"[1]", b"{}", b'{"messages": []}', b'{"messages": {}}', b"\xff\xfe", b"[" * 100_000],
)
def test_what_tells_no_conversation(body: bytes) -> None:
    assert session_of(None, body) == ""


@pytest.mark.parametrize("odd", [[None], [[1]], ["a", 1], "\ud800", 5, {"a": 1}, [said("user", None)]])
def test_odd_prompts_are_the_replica_s_to_refuse(odd: Any) -> None:
    for name in ("messages", "input", "prompt"):
        assert session({name: odd}) == session({name: odd})


# Metrics -------------------------------------------------------------------------------------------------------------


def test_metrics_of_replicas_stand_side_by_side() -> None:
    page = '# HELP a_total Things.\n# TYPE a_total counter\na_total{{kind="x"}} {}\n# TYPE b gauge\nb {}\n'
    lines = merged([("one", page.format(1, 2)), ("two", page.format(3, 4))]).decode().splitlines()
    assert 'a_total{kind="x",replica="one"} 1.0' in lines
    assert 'a_total{kind="x",replica="two"} 3.0' in lines
    assert [line for line in lines if line.startswith("b{")] == ['b{replica="one"} 2.0', 'b{replica="two"} 4.0']
    assert lines.count("# TYPE a_total counter") == 1


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_replicas": 0}, "num_replicas must be an integer in"),
        ({"num_replicas": 2, "autoscaling_config": {}}, "num_replicas must be left out where autoscaling"),
        ({"autoscaling_config": 3}, "autoscaling_config must be a mapping of names to values, got 3"),
        ({"ray_actor_options": {1: 2}}, "ray_actor_options must be a mapping"),
        ({"ingress_replicas": "two"}, "ingress_replicas must be an integer"),
        ({"model": ""}, "model must be a path"),
        ({"weights": 4}, "weights must be a string, got 4"),
        ({"adapters": ["folder"]}, "adapters must be a mapping of names to values"),
        ({"adapters": {"legal": ""}}, r"adapters\['legal'\] must be a path"),
        ({"adapter": 4}, "adapter must be a path"),
        ({"batch_invariant": "yes"}, "batch_invariant must be True or False"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RaySettings(**{"model": "6x6", **fields})


def test_a_replica_has_a_gpu_unless_it_is_told_otherwise() -> None:
    assert RaySettings("6x6").ray_actor_options == {"num_gpus": 1}
    assert RaySettings("6x6", device="cpu").ray_actor_options == {}
    assert RaySettings("6x6", ray_actor_options={"num_gpus": 2}).ray_actor_options == {"num_gpus": 2}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RaySettings, ServeOptions]]:
    """What `app` asks `build` for."""
    found: list[tuple[RaySettings, ServeOptions]] = []

    def build(model: str, options: ServeOptions, **rest: Any) -> None:
        found.append((RaySettings(model, **rest), options))

    monkeypatch.setattr(integration, "build", build)
    monkeypatch.delenv("DGEMMA_API_KEY", raising=False)
    return found


def test_arguments_of_serve_run_are_text(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    integration.app(
        {"model": "google/model", "autoscaling_config": '{"max_replicas": 4}', "max_batch": "16", "log_prompts": "true"}
    )
    monkeypatch.setenv("DGEMMA_API_KEY", "from the environment")
    integration.app({"model": "/models/mine", "num_replicas": "2", "api_key": "1234", "served_model_names": "a"})
    integration.app({"model": "6x6", "served_model_names": ["a", "b"], "ray_actor_options": {"num_gpus": 1}})
    (first, served), (second, secured), (_, listed) = built
    assert first.autoscaling_config == {"max_replicas": 4}
    assert (served.max_batch, served.log_prompts, served.served_model_names) == (16, True, ("google/model",))
    assert served.api_key is None
    assert second.num_replicas == 2
    assert (secured.api_key, secured.served_model_names) == ("1234", ("a",))
    assert (listed.api_key, listed.served_model_names) == ("from the environment", ("a", "b"))
    assert second.usual_name == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "model must be among the arguments, got none"),
        ({"model": "6x6", "replicas": 2}, "replicas is not an argument; known are activations"),
        ({"model": "6x6", "port": 8000}, "port is not an argument"),
        ({"model": "6x6", "max_batch": "many"}, "max_batch must be an integer"),
    ],
)
def test_arguments_that_are_refused(built: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        integration.app(arguments)
    assert not built


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'dgemma_ext\[ray\]'"):
        integration.build("6x6")


# Examples ------------------------------------------------------------------------------------------------------------


def test_the_example_for_kubernetes_is_understood(built: Any) -> None:
    service = yaml.safe_load((EXAMPLES / "rayservice.yaml").read_text(encoding="utf-8"))
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == f"{integration.__name__}:app"
    integration.app(application["args"])
    ((settings, options),) = built
    cluster = service["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert settings.ray_actor_options is not None
    assert settings.autoscaling_config is not None
    assert int(limits["nvidia.com/gpu"]) == settings.ray_actor_options["num_gpus"] == 1
    assert int(limits["cpu"]) >= settings.ray_actor_options["num_cpus"]
    assert workers["maxReplicas"] == settings.autoscaling_config["max_replicas"]
    assert pod["terminationGracePeriodSeconds"] > options.drain_timeout
    pinned = (ROOT / "requirements" / "ray.txt").read_text(encoding="utf-8")
    assert f"ray[serve]=={cluster['rayVersion']}\n" in pinned


def test_the_example_for_docker_is_understood() -> None:
    compose = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))
    service = compose["services"]["dgemma"]
    program, *words = service["command"]
    assert program == "dgemma"
    arguments = build_parser().parse_args(words)
    assert int(service["stop_grace_period"].removesuffix("s")) > arguments.drain_timeout
    assert set(compose["volumes"]) == {volume.split(":")[0] for volume in service["volumes"]}


def test_a_replica_is_told_all_that_loading_asks_for() -> None:
    wanted = set(inspect.signature(dg.DiffusionGemma.from_pretrained).parameters)
    assert set(RaySettings("6x6").loading) == wanted - {"merge"}, "merging is done once, by dgemma quantize"


def test_the_fields_of_both_kinds_have_names_of_their_own() -> None:
    names = [field.name for kind in (RaySettings, ServeOptions) for field in dataclasses.fields(kind)]
    assert len(names) == len(set(names))
