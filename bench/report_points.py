"""The points that `make report` measures: each is a model, a way to run it, and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = ("fixed", "adaptive", "prefill", "profile", "transformers")


@dataclass(frozen=True)
class Point:
    """One measurement.

    kind: "fixed" makes `steps` denoising steps for every canvas, "adaptive" stops as the sampler decides, "prefill"
    encodes the prefix, "profile" is `dgemma profile`, "transformers" is "fixed" by transformers' own generate.
    experts: how many the random model's routing hits. flat: distributions are flat, not peaked.
    """

    kind: str
    weights: str
    experts: int
    batch: int
    prefix: int
    steps: int = 0
    flat: bool = False

    @property
    def name(self) -> str:
        words = [self.kind, self.weights, f"experts-{self.experts}", f"batch-{self.batch}", f"prefix-{self.prefix}"]
        return " ".join(words + [f"steps-{self.steps}"] * (self.steps > 0) + ["flat"] * self.flat)

    @property
    def model(self) -> tuple[str, int]:
        """The model that must be made to measure the point: points of one model follow each other."""
        return self.weights, self.experts

    def fields(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Scale:
    """The size of a report: sizes of the random model, and the points of every axis."""

    name: str
    layers: int
    # Fields of text_config that differ from the published ones.
    changes: dict[str, Any]
    # (weights, experts hit), the most important first.
    models: tuple[tuple[str, int], ...]
    batches: tuple[int, ...]
    prefixes: tuple[int, ...]
    steps: tuple[int, int]
    # The prefix of the axis over batches, and the prefixes that are profiled.
    prefix: int
    profiled: tuple[int, ...]
    transformers_batches: tuple[int, ...]
    compile_transformers: bool
    repeats: int
    # Further points for the goals: bfloat16 with all experts.
    extra: tuple[Point, ...] = field(default=())


FULL = Scale(
    name="full",
    layers=30,
    changes={},
    models=(("bfloat16", 128), ("fp8", 84), ("fp8", 128), ("bfloat16", 84), ("int4", 84), ("int4", 128)),
    batches=(1, 2, 4, 8, 16, 32),
    prefixes=(128, 1024, 4096, 8192, 16_384, 32_768, 65_536),
    steps=(16, 48),
    prefix=128,
    profiled=(128, 4096, 8192),
    transformers_batches=(1, 4, 8),
    compile_transformers=True,
    repeats=3,
    extra=(
        # The goals for the experts are at 1,024, 2,048 and 4,096 tokens.
        *(Point("profile", "bfloat16", 128, batch, 128) for batch in (4, 8, 16)),
        Point("profile", "bfloat16", 128, 1, 128, flat=True),
        # The cost of another canvas after a long prefix, and the conditions of the published curve (2,048, 48 steps).
        Point("fixed", "bfloat16", 128, 8, 8192, steps=16),
        *(Point("fixed", "bfloat16", 128, batch, 2048, steps=48) for batch in (1, 4, 8)),
        Point("fixed", "bfloat16", 128, 4, 128, steps=48),
    ),
)

# All of the above at sizes that a CPU measures in a minute; the figures only prove the code.
SMALL = Scale(
    name="small",
    layers=2,
    changes={
        "hidden_size": 256,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "num_experts": 16,
        "top_k_experts": 4,
        "vocab_size": 4096,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 64,
        "global_head_dim": 128,
        "sliding_window": 64,
        "max_position_embeddings": 2048,
        "canvas_length": 32,
    },
    models=(("bfloat16", 16), ("int4", 12)),
    batches=(1, 2),
    prefixes=(32, 96),
    steps=(2, 4),
    prefix=32,
    profiled=(96,),
    transformers_batches=(1,),
    compile_transformers=False,
    repeats=1,
    extra=(Point("profile", "bfloat16", 16, 1, 32, flat=True),),
)


def points(scale: Scale) -> list[Point]:
    """Every point once, the most important first, in case a run is cut short: each model's step by batch and its parts;
    then the rest, model by model, because a model takes a while to make; last transformers, whose runs are longest."""
    models = scale.models
    telling = [point for model in models for point in _telling(scale, *model)]
    rest = [point for model in models for point in _rest(scale, *model)]
    peers = [
        Point("transformers", weights, experts, batch, scale.prefix, steps=scale.steps[0])
        for weights, experts in models
        if weights == "bfloat16"
        for batch in scale.transformers_batches
    ]
    return list(dict.fromkeys((*telling, *rest, *peers)))


def _telling(scale: Scale, weights: str, experts: int) -> Iterator[Point]:
    yield Point("fixed", weights, experts, 1, scale.prefix, steps=scale.steps[0])
    yield Point("profile", weights, experts, 1, scale.profiled[0])
    for batch in (4, 8):
        if batch in scale.batches:
            yield Point("fixed", weights, experts, batch, scale.prefix, steps=scale.steps[0])


def _rest(scale: Scale, weights: str, experts: int) -> Iterator[Point]:
    short, long = scale.steps
    for prefix in scale.profiled:
        yield Point("profile", weights, experts, 1, prefix)
    for batch in scale.batches:
        yield Point("fixed", weights, experts, batch, scale.prefix, steps=short)
    yield from (point for point in scale.extra if point.model == (weights, experts))
    for prefix in scale.prefixes:
        yield Point("fixed", weights, experts, 1, prefix, steps=short)
        yield Point("prefill", weights, experts, 1, prefix)
    for batch in dict.fromkeys((1, min(8, scale.batches[-1]))):
        yield Point("fixed", weights, experts, batch, scale.prefix, steps=long)
        yield Point("adaptive", weights, experts, batch, scale.prefix)
