"""What an application of Ray Serve is told beside the server's own options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_ext import arguments


@dataclass(frozen=True)
class RaySettings:
    """A model on replicas.

    model, device, dtype, weights, activations, batch_invariant, images, image_attention, adapter, adapters, passes: as
    in `from_pretrained`, which each replica calls on its machine. adapters: names to folders or hub ids.
    num_replicas: how many. autoscaling_config: or Ray's AutoscalingConfig as a mapping, such as {"min_replicas": 1,
    "max_replicas": 8}; target_ongoing_requests is max_batch unless it is given, so that replicas are added when
    requests wait for a slot. ray_actor_options: what a replica takes of a machine, default {"num_gpus": 1}, or no GPU
    where device is "cpu". ingress_replicas: processes that hand requests out; they load no model.

    Raises ValueError naming the field.
    """

    model: str
    num_replicas: int | None = None
    autoscaling_config: Mapping[str, Any] | None = None
    ray_actor_options: Mapping[str, Any] | None = None
    ingress_replicas: int = 1
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "auto"
    activations: str | None = None
    batch_invariant: bool = False
    images: str | bool = "auto"
    image_attention: str = "sliding"
    adapter: str | None = None
    adapters: Mapping[str, str] | None = None
    passes: str | None = None

    def __post_init__(self) -> None:
        replicas, scaling = self.num_replicas, self.autoscaling_config
        if replicas is not None and scaling is not None:
            raise arguments.refusal("num_replicas", "left out where autoscaling_config is given", replicas)
        device = arguments.text("device", self.device)
        for name, value in (
            ("model", arguments.path("model", self.model)),
            ("num_replicas", None if replicas is None else arguments.integer("num_replicas", replicas, least=1)),
            ("autoscaling_config", None if scaling is None else _mapping("autoscaling_config", scaling)),
            ("ray_actor_options", self._actor_options(device)),
            ("ingress_replicas", arguments.integer("ingress_replicas", self.ingress_replicas, least=1)),
            ("dtype", arguments.text("dtype", self.dtype)),
            ("weights", arguments.text("weights", self.weights)),
            ("activations", None if self.activations is None else arguments.text("activations", self.activations)),
            ("batch_invariant", arguments.flag("batch_invariant", self.batch_invariant)),
            ("adapter", None if self.adapter is None else arguments.path("adapter", self.adapter)),
            ("adapters", None if self.adapters is None else _paths("adapters", self.adapters)),
            ("passes", None if self.passes is None else arguments.text("passes", self.passes)),
        ):
            object.__setattr__(self, name, value)

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` in a replica."""
        return {
            "path_or_hub_id": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "weights": self.weights,
            "activations": self.activations,
            "batch_invariant": self.batch_invariant,
            "images": self.images,
            "image_attention": self.image_attention,
            "adapter": self.adapter,
            "adapters": self.adapters,
            "passes": self.passes,
        }

    @property
    def usual_name(self) -> str:
        """What clients call the model where nobody says: a hub id as it is written, a folder by its own name."""
        return Path(self.model).name if self.model.startswith(("/", ".", "~")) else self.model

    def _actor_options(self, device: str) -> dict[str, Any]:
        if self.ray_actor_options is None:
            return {} if device == "cpu" else {"num_gpus": 1}
        return _mapping("ray_actor_options", self.ray_actor_options)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise arguments.refusal(name, "a mapping of names to values", value)
    return dict(value)


def _paths(name: str, value: Any) -> dict[str, str]:
    return {key: arguments.path(f"{name}[{key!r}]", path) for key, path in _mapping(name, value).items()}
