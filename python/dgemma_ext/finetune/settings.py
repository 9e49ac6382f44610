"""What a run of fine-tuning is told, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dgemma_ext import arguments

TARGETS = ("attention", "mlp", "self-conditioning", "router", "experts")
PASSES = ("shared", "separate")
# Examples among which the next one is drawn.
SHUFFLE_BUFFER = 4096


@dataclass(frozen=True)
class LoraSettings:
    """rank, alpha: the factors' product is multiplied by alpha / rank. targets: some of TARGETS. passes: "shared", one
    set of factors for both passes, or "separate"."""

    rank: int = 16
    alpha: float = 32.0
    targets: Sequence[str] = ("attention", "mlp")
    passes: str = "shared"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", arguments.integer("rank", self.rank, least=1, end=1025))
        object.__setattr__(self, "alpha", arguments.number("alpha", self.alpha, zero=False))
        wanted = f"some of {', '.join(TARGETS)}"
        targets = arguments.sequence("targets", self.targets, wanted)
        if not targets or len(set(map(str, targets))) < len(targets):
            raise arguments.refusal("targets", wanted, self.targets)
        for target in targets:
            arguments.choice("targets", target, TARGETS)
        # In one order, so that it does not matter how they were listed.
        object.__setattr__(self, "targets", tuple(target for target in TARGETS if target in targets))
        arguments.choice("passes", self.passes, PASSES)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class FinetuneSettings:
    """A run. Defaults are those of the published recipe for this model.

    steps, batch: optimizer steps, and examples of each; micro_batch: examples that go through the model together, which
    changes memory and time alone, up to rounding (default: batch). rate: the learning rate, which rises over `warmup`
    steps and falls by a cosine to a tenth. beta1, beta2, weight_decay: of AdamW. clip: the largest norm of a gradient.
    seed: of every draw. max_length: positions of prompt and answer. encoder_loss: the weight of the next-token loss of
    the encode pass; 0 leaves it out. self_conditioning: the share of examples whose canvas is denoised with
    self-conditioning. noise: the level's distribution, "uniform", or "high", which is 1 - u^2. shuffle_buffer: examples
    among which the next one is drawn. eval_every, eval_count: steps between evaluations, and how many of the held-out
    examples each takes. save_every: steps between states. Raises ValueError naming the field.
    """

    steps: int = 800
    batch: int = 8
    micro_batch: int | None = None
    rate: float = 1.5e-4
    warmup: int = 25
    beta1: float = 0.95
    beta2: float = 0.99
    weight_decay: float = 1e-4
    clip: float = 1.0
    seed: int = 0
    max_length: int = 4096
    encoder_loss: float = 1.0
    self_conditioning: float = 0.5
    noise: str = "uniform"
    shuffle_buffer: int = SHUFFLE_BUFFER
    eval_every: int = 100
    eval_count: int = 64
    save_every: int = 50
    lora: LoraSettings = LoraSettings()

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("steps", "batch", "max_length", "shuffle_buffer", "eval_every", "eval_count", "save_every"):
            put(name, arguments.integer(name, getattr(self, name), least=1))
        if self.micro_batch is not None:
            put("micro_batch", arguments.integer("micro_batch", self.micro_batch, least=1))
        put("warmup", arguments.integer("warmup", self.warmup))
        put("seed", arguments.integer("seed", self.seed, end=2**63))
        for name in ("rate", "clip"):
            put(name, arguments.number(name, getattr(self, name), zero=False))
        for name in ("weight_decay", "encoder_loss"):
            put(name, arguments.number(name, getattr(self, name)))
        for name in ("beta1", "beta2", "self_conditioning"):
            value = arguments.number(name, getattr(self, name))
            if value > 1 or (value == 1 and name != "self_conditioning"):
                raise arguments.refusal(
                    name, "a number in [0, 1)" if name != "self_conditioning" else "in [0, 1]", value
                )
            put(name, value)
        arguments.choice("noise", self.noise, ("uniform", "high"))
        arguments.instance("lora", self.lora, LoraSettings, "LoraSettings")

    @property
    def pass_batch(self) -> int:
        """Examples that go through the model together."""
        return min(self.micro_batch or self.batch, self.batch)

    def deciding(self) -> dict[str, Any]:
        """What decides the bits of a run, as JSON types: a run is continued with the same."""
        found = asdict(self)
        for name in ("eval_every", "eval_count", "save_every"):
            del found[name]
        found["lora"]["targets"] = list(self.lora.targets)
        return found
