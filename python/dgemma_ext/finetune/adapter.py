"""The trained factors: which matrices have them, how they begin, and their form in PEFT's files.

A matrix W [out, in] of the base becomes W + scale * B @ A with A [rank, in] and B [out, rank]; of the experts each has
its own. The encode and the denoising pass share one set of factors, or each has its own: PEFT, which knows the passes
as two modules, always gets both names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext.checkpoint import ModelConfig, layer_layout, model_layout
from dgemma_ext.finetune.draws import Purpose, uniforms
from dgemma_ext.finetune.settings import LoraSettings
from dgemma_ext.ops.gradients import ExpertFactors

DECODER, ENCODER = "decoder", "encoder"
PASSES = (ENCODER, DECODER)
_STACK_NAMES = {DECODER: "model.decoder.", ENCODER: "model.encoder.language_model."}
_FILE_PREFIX = "base_model.model."
# The release of PEFT that writes factors of experts as they are written here; those before 0.19 exchange in and out.
_LAYOUT_OF_PEFT = "0.21.2"
# Attributes of LayerWeights by target.
_LAYER_TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "router": ("router_proj",),
    "experts": ("experts_gate_up", "experts_down"),
}
_SELF_CONDITIONING = tuple(f"self_conditioning_{name}_proj" for name in ("gate", "up", "down"))


@dataclass(frozen=True)
class Factor:
    """The factors of one matrix. a: [rank, in], b: [out, rank], with a leading dimension for experts."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class _Site:
    """A matrix that has factors. `module`: its name in a stack, without the parameter's own name."""

    layer: int | None
    attribute: str
    module: str
    shape: tuple[int, ...]


class TrainedAdapter:
    """The factors of every adapted matrix, float32, for both passes.

    `factors(which)` gives those of a pass by (layer, attribute of LayerWeights), or (None, attribute of ModelWeights).
    """

    def __init__(self, config: ModelConfig, settings: LoraSettings, seed: int, device: torch.device) -> None:
        self.settings = settings
        self.scale = settings.scale
        self._sites = list(_sites(config, settings.targets))
        self._stacks: dict[str, dict[tuple[int | None, str], Factor]] = {DECODER: {}, ENCODER: {}}
        for number, site in enumerate(self._sites):
            own = (DECODER,) if site.layer is None else PASSES
            made: Factor | None = None
            for index, which in enumerate(own):
                if made is None or settings.passes == "separate":
                    made = _begun(site, settings.rank, seed, 2 * number + index, device)
                self._stacks[which][site.layer, site.attribute] = made

    def factors(self, which: str) -> dict[tuple[int | None, str], Factor]:
        return self._stacks[which]

    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by a name of their own: of shared factors once."""
        found: dict[str, Tensor] = {}
        for which, site, factor in self._each():
            if which == ENCODER and self.settings.passes == "shared":
                continue
            found |= {f"{which}.{site.module}.{name}": tensor for name, tensor in (("a", factor.a), ("b", factor.b))}
        return found

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(tensor.numel() for tensor in self.parameters().values())

    def peft_tensors(self, gradients: bool = False) -> dict[str, Tensor]:
        """The tensors of adapter_model.safetensors, or their gradients, on the CPU. Experts are flat there: A with the
        experts' ranks one after another, B with an expert's columns strided by their number."""
        found = {}
        for which, site, factor in self._each():
            name = f"{_FILE_PREFIX}{_STACK_NAMES[which]}{site.module}"
            a, b = (_gradient(one) if gradients else one.detach() for one in (factor.a, factor.b))
            if a.dim() == 3:
                a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
            for letter, tensor in (("A", a), ("B", b)):
                found[f"{name}.lora_{letter}.weight"] = tensor.to("cpu", copy=True).contiguous()
        return found

    def peft_config(self, base_model: str) -> dict[str, Any]:
        """adapter_config.json."""
        settings, experts = self.settings, "experts" in self.settings.targets
        return {
            "peft_type": "LORA",
            "peft_version": _LAYOUT_OF_PEFT,
            "base_model_name_or_path": base_model,
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "target_modules": _module_pattern(settings.targets),
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"] if experts else None,
            "use_dora": False,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "task_type": None,
        }

    def _each(self) -> Iterator[tuple[str, _Site, Factor]]:
        for site in self._sites:
            for which in PASSES:
                factor = self._stacks[which].get((site.layer, site.attribute))
                if factor is not None:
                    yield which, site, factor


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def low_rank(x: Tensor, factor: Factor | None, scale: float) -> Tensor | float:
    """scale * B (A x), in x's dtype; 0 without factors."""
    if factor is None:
        return 0.0
    return scale * functional.linear(functional.linear(x, factor.a.to(x.dtype)), factor.b.to(x.dtype))


def expert_factors(factor: Factor | None, scale: float, dtype: torch.dtype) -> ExpertFactors | None:
    return None if factor is None else ExpertFactors(factor.a.to(dtype), factor.b.to(dtype), scale)


def factor_sizes(config: ModelConfig, settings: LoraSettings) -> int:
    """How many numbers an adapter with these settings trains."""
    total = 0
    for site in _sites(config, settings.targets):
        experts = site.shape[0] if len(site.shape) == 3 else 1
        passes = 2 if settings.passes == "separate" and site.layer is not None else 1
        total += passes * experts * settings.rank * sum(site.shape[-2:])
    return total


def _sites(config: ModelConfig, targets: Sequence[str]) -> Iterator[_Site]:
    """Every matrix that the targets name, in the order of the layers."""
    if "self-conditioning" in targets:
        layout = model_layout(config)
        for attribute in _SELF_CONDITIONING:
            name, shape = layout[attribute]
            yield _Site(None, attribute, name.removeprefix(_STACK_NAMES[DECODER]).removesuffix(".weight"), shape)
    wanted = [attribute for target in targets for attribute in _LAYER_TARGETS.get(target, ())]
    for layer in config.layers:
        layout = layer_layout(config, layer)
        for attribute in wanted:
            if attribute not in layout:
                continue  # a full layer has no v_proj
            name, shape = layout[attribute]
            module = name.removeprefix(_STACK_NAMES[DECODER]).removesuffix(".weight")
            # PEFT wraps the experts once for each of their two parameters, and the inner one is the first.
            module = re.sub(r"experts\.gate_up_proj$", "experts.base_layer", module)
            yield _Site(layer.index, attribute, re.sub(r"experts\.down_proj$", "experts", module), shape)


def _begun(site: _Site, rank: int, seed: int, number: int, device: torch.device) -> Factor:
    """A uniform in ±1 / sqrt(in), as PEFT begins it, and B zero."""
    *experts, outputs, inputs = site.shape
    shape = (*experts, rank, inputs)
    draws = uniforms(seed, torch.tensor([number], device="cpu"), 0, torch.Size(shape).numel(), Purpose.FACTORS)
    a = ((2 * draws - 1) * inputs**-0.5).view(shape).to(device, torch.float32)
    b = torch.zeros((*experts, outputs, rank), dtype=torch.float32, device=device)
    return Factor(a.requires_grad_(), b.requires_grad_())


def _module_pattern(targets: Sequence[str]) -> str:
    """A regular expression of the adapted modules' names, which PEFT compares with whole names."""
    in_layers = {
        "attention": r"self_attn\.(q|k|v|o)_proj",
        "mlp": r"mlp\.(gate|up|down)_proj",
        "router": r"router\.proj",
    }
    layers = "|".join(in_layers[target] for target in targets if target in in_layers)
    parts = []
    if layers:
        parts.append(rf"model\.(encoder\.language_model|decoder)\.layers\.\d+\.({layers})")
    if "self-conditioning" in targets:
        parts.append(r"model\.decoder\.self_conditioning\.(gate|up|down)_proj")
    # No module has this name, where parameters of the experts alone are adapted.
    return "|".join(parts) or "no_module"
