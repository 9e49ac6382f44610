"""Checkpoints for tests: small random ones in the published layout.

Tensor names and shapes come from transformers' own model class, so that they are a check on this package's table and
not a copy of it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tokenizer_files import write_tokenizer

SLIDING = "sliding_attention"
FULL = "full_attention"

# The settings of the published generation_config.json.
GENERATION_CONFIG: dict[str, Any] = {
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_max": 0.8,
    "t_min": 0.4,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "max_new_tokens": 256,
    "eos_token_id": [1, 106, 50],
    "pad_token_id": 0,
    "transformers_version": "5.8.0.dev0",
}


def config_for(
    *,
    layers: int | Sequence[str] = (SLIDING, SLIDING, FULL),
    hidden: int = 64,
    intermediate: int = 96,
    moe_intermediate: int = 32,
    experts: int = 8,
    top_k: int = 2,
    vocabulary: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    global_kv_heads: int = 1,
    head_dim: int = 16,
    global_head_dim: int = 32,
    window: int = 16,
    canvas: int = 8,
    max_positions: int = 4096,
    softcap: float = 30.0,
    sliding_theta: float = 10_000.0,
    full_theta: float = 1_000_000.0,
    partial_rotary_factor: float = 0.25,
    dialect: str = "flat",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """A config.json. `layers` is a count (every sixth layer and the last are full) or the list of layer types.

    `dialect` "flat" spells the full layers' heads as the published file does, "per_layer" as transformers writes them.
    """
    if isinstance(layers, int):
        layers = [FULL if (i + 1) % 6 == 0 or i + 1 == layers else SLIDING for i in range(layers)]
    text: dict[str, Any] = {
        "model_type": "diffusion_gemma_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": 1,
        "final_logit_softcapping": softcap,
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "layer_types": list(layers),
        "max_position_embeddings": max_positions,
        "moe_intermediate_size": moe_intermediate,
        "num_attention_heads": heads,
        "num_experts": experts,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": sliding_theta},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": full_theta,
                "partial_rotary_factor": partial_rotary_factor,
            },
        },
        "sliding_window": window,
        "tie_word_embeddings": True,
        "top_k_experts": top_k,
        "use_bidirectional_attention": "vision",
        "vocab_size": vocabulary,
    }
    if dialect == "flat":
        text |= {"global_head_dim": global_head_dim, "num_global_key_value_heads": global_kv_heads}
    elif dialect == "per_layer":
        full = {"head_dim": global_head_dim, "num_key_value_heads": global_kv_heads}
        text["per_layer_config"] = {str(i): full for i, layer_type in enumerate(layers) if layer_type == FULL}
    else:
        raise ValueError(f"dialect is {dialect!r}; wanted: flat or per_layer")
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": canvas,
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": [1, 106],
        "boi_token_id": 255_999,
        "eoi_token_id": 258_882,
        "image_token_id": 258_880,
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "position_embedding_size": 64,
            "standardize": True,
        },
        "vision_soft_tokens_per_image": 280,
    }


def make_checkpoint(
    directory: str | Path,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    with_tokenizer: bool = True,
    final_norm_scale: float = 3.0,
    images: bool = False,
    **sizes: Any,
) -> Path:
    """Writes a random checkpoint in the published layout and returns its folder; `sizes` go to `config_for`.

    Every tensor's values depend on `seed` and its name alone. Matrices keep the variance of what they multiply; norms,
    scales and layer scalars spread around 1 (the encoder's scalars differ from the decoder's); `final_norm_scale`
    widens the logits. images: whether prompts may have them, because the tokenizer knows their tokens. Drawn in
    `dtype`, one shard in memory at a time.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = config_for(dtype=dtype, **sizes)
    if images:
        config |= {"boi_token_id": 501, "image_token_id": 500, "eoi_token_id": 502}
        config["vision_config"]["position_embedding_size"] = 128
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", GENERATION_CONFIG)
    if with_tokenizer:
        write_tokenizer(directory, config["text_config"]["vocab_size"], images)

    shapes = published_names(config)
    names = list(shapes)
    files: dict[str, str] = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        tensors = {name: _random_tensor(name, shapes[name], dtype, seed, final_norm_scale) for name in mine}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(mine, file)
    if shards > 1:
        total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})
    return directory


def published_names(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored tensor: transformers' state without what it ties to the decoder."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(config))
    encoder_text = "model.encoder.language_model."
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" and (not name.startswith(encoder_text) or name.endswith("layer_scalar"))
    }


def _random_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, final_norm_scale: float
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    tensor = torch.empty(shape, dtype=dtype)
    if name.endswith("layer_scalar"):
        return tensor.uniform_(0.5, 1.25, generator=generator)
    if name.endswith("router.proj.weight"):
        # The router's input has length one per token after its 1/sqrt(hidden), so scores spread by two.
        return tensor.normal_(0.0, 2.0, generator=generator)
    if len(shape) == 1 and name.endswith(("q_norm.weight", "k_norm.weight")):
        # Attention has no 1/sqrt(head_dim): the norms' weights set how peaked it is.
        return tensor.normal_(0.6, 0.1, generator=generator)
    if name == "model.decoder.norm.weight":
        return tensor.normal_(final_norm_scale, 0.2 * final_norm_scale, generator=generator)
    if len(shape) == 1:
        return tensor.normal_(1.0, 0.2, generator=generator)
    return tensor.normal_(0.0, shape[-1] ** -0.5, generator=generator)


def load_transformers(
    directory: str | Path,
    dtype: torch.dtype,
    attn_implementation: str = "eager",
    experts_implementation: str = "eager",
    text_only: bool = False,
) -> Any:
    """The checkpoint as transformers' DiffusionGemmaForBlockDiffusion, in evaluation mode, every stored tensor used.

    text_only: the file holds no vision tower, which transformers then makes up.
    """
    from transformers import DiffusionGemmaForBlockDiffusion

    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation=attn_implementation,
        experts_implementation=experts_implementation,
        output_loading_info=True,
    )
    model, loading = loaded
    faults = {kind: set(loading[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if text_only:
        faults["missing_keys"] = {name for name in faults["missing_keys"] if "vision" not in name}
    faults = {kind: names for kind, names in faults.items() if names}
    assert not faults, faults
    return model.eval()


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
