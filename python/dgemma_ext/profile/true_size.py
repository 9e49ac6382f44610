"""DiffusionGemma 26B-A4B with random weights: the published shapes, with any number of layers and no checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch

from dgemma_ext import arguments
from dgemma_ext.checkpoint import (
    FULL,
    SLIDING,
    GenerationDefaults,
    Layout,
    ModelConfig,
    Target,
    layer_layout,
    model_layout,
)
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine import available_bytes
from dgemma_ext.model import LayerWeights, ModelWeights, Network, quantized_weight
from dgemma_ext.ops.formats import FORMATS
from dgemma_ext.units import format_bytes

LAYERS = 30
EXPERTS = 128
# One full layer after every five sliding ones.
_PATTERN = 6
# The published initializer_range.
_DEVIATION = 0.02

# The published config.json without its vision tower.
_TEXT: dict[str, Any] = {
    "model_type": "diffusion_gemma_text",
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "moe_intermediate_size": 704,
    "num_experts": EXPERTS,
    "top_k_experts": 8,
    "vocab_size": 262_144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 1024,
    "max_position_embeddings": 262_144,
    "use_bidirectional_attention": "vision",
}


def true_config(layers: int = LAYERS, **changes: Any) -> ModelConfig:
    """The published configuration with `layers` layers, the last a full one. changes: canvas_length, and fields of
    text_config. Raises ValueError as ModelConfig.from_dict does."""
    return ModelConfig.from_dict(config_dict(layers, **changes))


def config_dict(layers: int = LAYERS, canvas_length: int = 256, **changes: Any) -> dict[str, Any]:
    """`true_config` as the content of config.json."""
    kinds = [FULL if index % _PATTERN == _PATTERN - 1 or index == layers - 1 else SLIDING for index in range(layers)]
    text = {**_TEXT, "num_hidden_layers": layers, "layer_types": kinds, **changes}
    return {
        "model_type": "diffusion_gemma",
        "canvas_length": canvas_length,
        "dtype": "bfloat16",
        "eos_token_id": [1, 106],
        "text_config": text,
    }


def random_model(
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    target: Target | None = None,
    experts_hit: int | None = None,
    final_norm: float = 1.0,
    seed: int = 0,
    activations: str | None = None,
) -> DiffusionGemma:
    """A model with normally distributed weights and with norms and scalars of 1, made on the device.

    target: the format that each layer is quantized to when it is made. experts_hit: routing hits about this many
    experts of a layer, because the router's rows of the others are zero; default all. final_norm: with 1 distributions
    are as peaked as the tied head makes them, with 0.05 they are flat. Raises ValueError where the device has too
    little free memory.
    """
    device = torch.device(device)
    hit = config.num_experts
    if experts_hit is not None:
        hit = arguments.integer("experts_hit", experts_hit, least=config.top_k_experts, end=config.num_experts + 1)
    _check_room(config, device, dtype, target)
    generator = torch.Generator(device).manual_seed(seed)

    def made(layout: Layout) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for attribute, (_, shape) in layout.items():
            value = torch.ones(shape, dtype=dtype, device=device)
            values[attribute] = value if len(shape) < 2 else value.normal_(0.0, _DEVIATION, generator=generator)
        return values

    layers = []
    for layer in config.layers:
        values = {"v_proj": None, **made(layer_layout(config, layer))}
        values["decoder_layer_scalar"] = values["encoder_layer_scalar"] = 1.0
        values["router_proj"][hit:] = 0.0
        if target is not None:
            for attribute in filter(target.wants, list(values)):
                if values[attribute] is not None:
                    values[attribute] = quantized_weight(attribute, values[attribute], target)
        layers.append(LayerWeights(**values))
    ends = made(model_layout(config))
    ends["norm"].fill_(final_norm)
    network = Network(config, ModelWeights(**ends, layers=layers), activations=activations)
    return DiffusionGemma(network, GenerationDefaults.from_dict({}, config), tokenizer=None)


def _check_room(config: ModelConfig, device: torch.device, dtype: torch.dtype, target: Target | None) -> None:
    wanted = 0.0
    for layout in (model_layout(config), *(layer_layout(config, layer) for layer in config.layers)):
        for attribute, (_, shape) in layout.items():
            # Scales are not counted, so that a model that fits is never rejected.
            quantized = target is not None and target.wants(attribute)
            bits = FORMATS[target.format].bits if target is not None and quantized else 8 * dtype.itemsize
            wanted += math.prod(shape) * bits / 8
    free = available_bytes(device)
    if free is not None and wanted > free:
        raise ValueError(
            f"a random model of {len(config.layers)} layers takes {format_bytes(round(wanted))}, and {device} has "
            f"{format_bytes(free)} free; fewer layers take less"
        )
