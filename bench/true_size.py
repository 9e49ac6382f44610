"""A random model of the true size, made on the device: 52 GB in bfloat16 that no file holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import dgemma_ext as dg
from dgemma_ext.checkpoint import layer_layout, model_layout
from dgemma_ext.config import GenerationDefaults, ModelConfig
from dgemma_ext.quantized.scheme import parse_target
from dgemma_ext.weights import LayerWeights, ModelWeights, quantized_weight

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

LAYERS = 30
EXPERTS = 128
DEVIATION = 0.02  # of the published initialisation


def true_config(layers: int = LAYERS, **changes: Any) -> ModelConfig:
    """DiffusionGemma 26B-A4B, five sliding layers to one full one."""
    from checkpoints import config_for

    kinds = tuple("full_attention" if index % 6 == 5 else "sliding_attention" for index in range(layers))
    sizes: dict[str, Any] = dict(
        layers=kinds,
        hidden=2816,
        intermediate=2112,
        moe_intermediate=704,
        experts=EXPERTS,
        top_k=8,
        vocabulary=262_144,
        heads=16,
        kv_heads=8,
        global_kv_heads=2,
        head_dim=256,
        global_head_dim=512,
        window=1024,
        canvas=256,
        max_positions=262_144,
    )
    config = config_for(**(sizes | changes))
    config.pop("vision_config", None)
    return ModelConfig.from_dict(config)


def random_model(
    config: ModelConfig,
    device: str = "cuda",
    experts_hit: int = EXPERTS,
    final_norm: float = 1.0,
    seed: int = 0,
    weights: str = "bfloat16",
) -> dg.DiffusionGemma:
    """Normal weights, unit norms and scalars. Routing hits about `experts_hit` experts a layer: the others' rows of the
    router are zero. final_norm: 1 leaves the logits as peaked as the tied head makes them, 0.05 makes them flat.
    weights: "bfloat16", or a format that each layer is quantized to when it is made."""
    target = None if weights == "bfloat16" else parse_target(weights)
    generator = torch.Generator(device).manual_seed(seed)

    def made(layout: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for attribute, (_, shape) in layout.items():
            value = torch.ones(shape, dtype=torch.bfloat16, device=device)
            values[attribute] = value if len(shape) < 2 else value.normal_(0.0, DEVIATION, generator=generator)
        return values

    layers = []
    for layer in config.layers:
        values = {"v_proj": None, **made(dict(layer_layout(config, layer)))}
        values["decoder_layer_scalar"] = values["encoder_layer_scalar"] = 1.0
        values["router_proj"][experts_hit:] = 0.0
        if target is not None:
            for attribute in filter(target.wants, list(values)):
                if values[attribute] is not None:
                    values[attribute] = quantized_weight(attribute, values[attribute], target)
        layers.append(LayerWeights(**values))
    ends = made(dict(model_layout(config)))
    ends["norm"].fill_(final_norm)
    made_weights = ModelWeights(**ends, layers=layers)
    return dg.DiffusionGemma(config, made_weights, GenerationDefaults.from_dict({}, config), None)
