"""`dgemma serve` on many machines: an application of Ray Serve whose replicas are the same engine (the extra `ray`).

    serve run dgemma_ext.integrations.ray:app model=MODEL num_replicas=2

A light ingress (ingress.py) reads a request's body, which tells its conversation (conversation.py), and hands it to the
replica that holds the conversation's prefix (router.py). A replica (replica.py) answers it with the application of
`dgemma_ext.serve`. Ray's own ingress chooses a replica before anybody has read the body, and answers status 500 where a
replica dies; here such a request is asked again of another replica, and is status 503 at worst.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from dgemma_ext.integrations.ray.settings import RaySettings
from dgemma_ext.serve import ServeOptions

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["RaySettings", "app", "build", "require"]

_KEY_VARIABLE = "DGEMMA_API_KEY"


def require() -> None:
    """Raises ValueError, naming the extra to install, where Ray Serve or a package of the server is missing."""
    missing = [name for name in ("ray", "fastapi", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"Ray Serve needs {', '.join(missing)}, which is not installed: pip install 'dgemma_ext[ray]'")


def build(model: str, options: ServeOptions | None = None, **settings: Any) -> Application:
    """An application for `ray.serve.run`, `serve run` or `serve deploy`.

    model: a folder that every machine has, a hub id or a bundled model, as in `from_pretrained`. options: those of
    `dgemma serve`; host and port are Ray's. settings: the further fields of `RaySettings`.

    Raises ValueError naming the argument, or where an extra package is missing.
    """
    require()
    from dgemma_ext.integrations.ray.application import application

    chosen = RaySettings(model=model, **_known("an argument of build", settings, RaySettings))
    return application(chosen, options or ServeOptions(served_model_names=[chosen.usual_name]))


def app(args: Mapping[str, Any]) -> Application:
    """What `serve run dgemma_ext.integrations.ray:app name=value ...` and a Serve config file call, with their args.

    args: fields of `RaySettings` and of `ServeOptions`; text stands for other types as JSON. The API key is taken from
    DGEMMA_API_KEY where args has none, because Ray shows args on its dashboard.

    Raises ValueError as `build` does.
    """
    named = {name: _value(name, value) for name, value in args.items()}
    server = {field.name for field in fields(ServeOptions)} - {"host", "port"}
    served = {name: named.pop(name) for name in list(named) if name in server}
    if "model" not in named:
        raise ValueError(f"model must be among the arguments, got {', '.join(sorted(args)) or 'none'}")
    settings = RaySettings(**_known("an argument", named, RaySettings))
    if served.get("api_key") is None:
        served["api_key"] = os.environ.get(_KEY_VARIABLE) or None
    served.setdefault("served_model_names", [settings.usual_name])
    rest = {name: value for name, value in named.items() if name != "model"}
    return build(settings.model, ServeOptions(**served), **rest)


# Arguments that are text, which is not read as JSON: a model may have a number for a name.
_TEXTS = ("model", "device", "dtype", "weights", "activations", "adapter", "passes", "api_key")


def _value(name: str, value: Any) -> Any:
    if not isinstance(value, str) or name in _TEXTS:
        return value
    try:
        return json.loads(value)
    except ValueError:
        return [value] if name in ("served_model_names", "cors_origins") else value


def _known(what: str, named: Mapping[str, Any], kind: type) -> dict[str, Any]:
    known = {field.name for field in fields(kind)}
    for name in named:
        if name not in known:
            raise ValueError(f"{name} is not {what}; known are {', '.join(sorted(known))}")
    return dict(named)
