"""The published checkpoint for tests: its configuration, and its tensors' names and shapes as files of holes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from checkpoints import GENERATION_CONFIG, config_for, write_json

PUBLISHED_PAYLOAD_BYTES = 51_647_562_456
# All but the number of layers.
PUBLISHED_SIZES: dict[str, int] = dict(
    hidden=2816,
    intermediate=2112,
    moe_intermediate=704,
    experts=128,
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
PUBLISHED_CONFIG = config_for(layers=30, **PUBLISHED_SIZES) | {
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "standardize": True,
    }
}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The 1,047 tensors of google/diffusiongemma-26B-A4B-it, as its headers list them."""
    shapes: dict[str, tuple[int, ...]] = {}
    decoder, vision = "model.decoder.", "model.encoder.vision_tower."
    mlp = {"gate_proj": (2112, 2816), "up_proj": (2112, 2816), "down_proj": (2816, 2112)}
    shapes[f"{decoder}embed_tokens.weight"] = (262_144, 2816)
    shapes[f"{decoder}norm.weight"] = shapes[f"{decoder}self_conditioning.pre_norm.weight"] = (2816,)
    shapes |= {f"{decoder}self_conditioning.{name}.weight": shape for name, shape in mlp.items()}
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    more_norms = ["post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"]
    for index in range(30):
        full = index % 6 == 5
        layer = f"{decoder}layers.{index}."
        shapes |= {f"{layer}{norm}.weight": (2816,) for norm in norms + more_norms}
        shapes |= {f"{layer}mlp.{name}.weight": shape for name, shape in mlp.items()}
        queries, keys, head_dim = (8192, 1024, 512) if full else (4096, 2048, 256)
        shapes[f"{layer}self_attn.q_proj.weight"] = (queries, 2816)
        shapes[f"{layer}self_attn.k_proj.weight"] = (keys, 2816)
        if not full:
            shapes[f"{layer}self_attn.v_proj.weight"] = (keys, 2816)
        shapes[f"{layer}self_attn.o_proj.weight"] = (2816, queries)
        shapes[f"{layer}self_attn.q_norm.weight"] = shapes[f"{layer}self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{layer}router.proj.weight"] = (128, 2816)
        shapes[f"{layer}router.scale"] = (2816,)
        shapes[f"{layer}router.per_expert_scale"] = (128,)
        shapes[f"{layer}experts.gate_up_proj"] = (128, 1408, 2816)
        shapes[f"{layer}experts.down_proj"] = (128, 2816, 704)
        shapes[f"{layer}layer_scalar"] = (1,)
        shapes[f"model.encoder.language_model.layers.{index}.layer_scalar"] = (1,)
    shapes["model.encoder.embed_vision.embedding_projection.weight"] = (2816, 1152)
    shapes[f"{vision}patch_embedder.input_proj.weight"] = (1152, 768)
    shapes[f"{vision}patch_embedder.position_embedding_table"] = (2, 10_240, 1152)
    shapes[f"{vision}std_bias"] = shapes[f"{vision}std_scale"] = (1152,)
    for index in range(27):
        layer = f"{vision}encoder.layers.{index}."
        shapes |= {f"{layer}{norm}.weight": (1152,) for norm in norms}
        shapes |= {f"{layer}self_attn.{name}_proj.linear.weight": (1152, 1152) for name in "qkvo"}
        shapes |= {f"{layer}self_attn.{name}_norm.weight": (72,) for name in "qk"}
        shapes |= {f"{layer}mlp.{name}_proj.linear.weight": (4304, 1152) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.linear.weight"] = (1152, 4304)
    return shapes


def write_published_layout(directory: str | Path, shards: int = 11) -> Path:
    """Writes the published checkpoint's configuration, index and shards: true headers over holes, no disk space."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", PUBLISHED_CONFIG)
    write_json(directory / "generation_config.json", GENERATION_CONFIG)
    shapes = published_shapes()
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}  # two bytes: bfloat16
    total = sum(sizes.values())
    assert (len(shapes), total) == (1047, PUBLISHED_PAYLOAD_BYTES)

    groups: list[list[str]] = [[] for _ in range(shards)]
    placed = 0
    for name, size in sizes.items():
        groups[placed * shards // total].append(name)
        placed += size
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        write_sparse_shard(directory / file, {name: ("BF16", shapes[name], sizes[name]) for name in group})
        weight_map |= dict.fromkeys(group, file)
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    return directory


def write_sparse_shard(file: Path, tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    """A safetensors file of the given dtypes, shapes and byte counts whose payload is a hole (reads as zero)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # the format's own writer pads to eight bytes
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + end)
