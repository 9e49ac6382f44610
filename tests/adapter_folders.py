"""Adapters for tests: PEFT's folders, and random tensors by PEFT's names without it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import dgemma_ext as dg

ENCODER, DECODER = "encoder.language_model", "decoder"
PREFIX = "base_model.model.model."
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "peft_version": "0.21.2"}


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    """Writes a folder as PEFT does; `settings` are added to SETTINGS."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def attention_and_mlp(config: dg.ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Module of a layer → columns and rows of its weight."""
    one, hidden, inner = config.layers[layer], config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * one.head_dim, one.num_key_value_heads * one.head_dim
    sizes = {"self_attn.q_proj": (hidden, queries), "self_attn.k_proj": (hidden, keys)}
    if not one.k_eq_v:
        sizes["self_attn.v_proj"] = (hidden, keys)
    sizes |= {"self_attn.o_proj": (queries, hidden), "mlp.down_proj": (inner, hidden)}
    return sizes | dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (hidden, inner))


def random_tensors(
    config: dg.ModelConfig, seed: int, stacks: Sequence[str] = (ENCODER, DECODER), rank: int = 4, scale: float = 0.3
) -> dict[str, torch.Tensor]:
    """Factors of all projections in each stack, drawn apart."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for stack in stacks:
        for layer in range(len(config.layers)):
            for module, (size_in, size_out) in attention_and_mlp(config, layer).items():
                name = f"{PREFIX}{stack}.layers.{layer}.{module}"
                tensors |= pair(name, size_in, size_out, rank, generator, scale)
    return tensors


def experts_tensors(config: dg.ModelConfig, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Factors of router and experts in the first layer of both stacks, and of the self-conditioning."""
    generator = torch.Generator().manual_seed(9)
    experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    tensors = {}
    for stack in (ENCODER, DECODER):
        layer = f"{PREFIX}{stack}.layers.0."
        tensors |= pair(f"{layer}router.proj", hidden, experts, 4, generator, scale)
        sizes = {f"{layer}experts": (inner, hidden), f"{layer}experts.base_layer": (hidden, 2 * inner)}
        for name, (size_in, size_out) in sizes.items():
            tensors |= pair(name, size_in, size_out, 4 * experts, generator, scale)
    conditioning = f"{PREFIX}decoder.self_conditioning.up_proj"
    return tensors | pair(conditioning, hidden, config.intermediate_size, 4, generator, scale)


def pair(
    name: str, size_in: int, size_out: int, rank: int, generator: torch.Generator, scale: float = 0.3
) -> dict[str, torch.Tensor]:
    a, b = (torch.randn(shape, generator=generator) * scale for shape in ((rank, size_in), (size_out, rank)))
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
