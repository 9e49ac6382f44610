"""Small DiffusionGemma checkpoints in the published format: configuration, files, weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

import tokenizer

EOS_IDS = [1, 106, 50]  # <eos>, <turn|>, <|tool_response>, as in the published generation_config.json

# The settings that differ by grid size. The rotary bases put one frequency at the length of a row and others near a
# band of boxes and the whole grid: only by these can the model tell where a cell is.
SHAPES: dict[int, dict[str, Any]] = {
    6: {
        "hidden_size": 96,
        "intermediate_size": 192,
        "moe_intermediate_size": 96,
        "sliding_window": 43,
        "sliding_theta": 100.0,
        "full_theta": 10_000.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    9: {
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "sliding_window": 88,
        "sliding_theta": 314.7,
        "full_theta": 99_030.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
}


# transformers always builds a vision tower, even for a checkpoint without one; this is the smallest.
_TINY_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 8,
    "position_embedding_size": 16,
}


def config_dictionary(size: int, **changes: Any) -> dict[str, Any]:
    """config.json for a `size` by `size` model: the published dialect, with the text model's own sub-dictionary."""
    shape = SHAPES[size] | changes
    canvas_length = size * size + 1  # the digits and <turn|>
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": tokenizer.VOCABULARY_SIZE,
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": len(shape["layer_types"]),
        "num_attention_heads": shape.get("num_attention_heads", 4),
        "num_key_value_heads": shape.get("num_key_value_heads", 4),
        "num_global_key_value_heads": shape.get("num_global_key_value_heads", 2),
        "head_dim": shape.get("head_dim", 32),
        "global_head_dim": shape.get("global_head_dim", 64),
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 1024,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": shape["sliding_theta"]},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": shape["full_theta"],
                "partial_rotary_factor": shape.get("partial_rotary_factor", 0.25),
            },
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": shape["sliding_window"],
        "layer_types": shape["layer_types"],
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": "vision",
        "num_experts": shape.get("num_experts", 4),
        "top_k_experts": shape.get("top_k_experts", 2),
        "moe_intermediate_size": shape["moe_intermediate_size"],
        "dtype": "bfloat16",
    }
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": dict(_TINY_VISION),
        "canvas_length": canvas_length,
        "boi_token_id": 381,
        "image_token_id": 382,
        "eoi_token_id": 383,
        "eos_token_id": EOS_IDS,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    }


def generation_dictionary(size: int) -> dict[str, Any]:
    return {
        "max_denoising_steps": 48,
        "t_min": 0.4,
        "t_max": 0.8,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "stability_threshold": 1,
        "confidence_threshold": 0.005,
        "max_new_tokens": size * size + 1,
        "eos_token_id": EOS_IDS,
        "pad_token_id": 0,
    }


def transformers_config(dictionary: dict[str, Any]) -> DiffusionGemmaConfig:
    return DiffusionGemmaConfig.from_dict(dictionary)


def save_settings(folder: Path, dictionary: dict[str, Any]) -> None:
    """Writes everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    size = round((dictionary["canvas_length"] - 1) ** 0.5)
    (folder / "config.json").write_text(json.dumps(dictionary, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation_dictionary(size), indent=2) + "\n")
    tokenizer.save(folder)


def published_tensors(model: DiffusionGemmaForBlockDiffusion) -> dict[str, torch.Tensor]:
    """The tensors that the published checkpoint stores, in bfloat16: the decoder's, and the encoder's layer scalars.

    The rest of the encoder and the head are tied to the decoder; there is no vision tower.
    """
    return {
        name: tensor.detach().to(torch.bfloat16).contiguous().clone()
        for name, tensor in model.state_dict().items()
        if name.startswith("model.decoder.")
        or (name.startswith("model.encoder.language_model.layers.") and name.endswith(".layer_scalar"))
    }


def save_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes model.safetensors so that a reader sees either the old file or the new one."""
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> DiffusionGemmaForBlockDiffusion:
    """Loads the checkpoint in transformers' class; raises unless its tensors are exactly those of the text model."""
    config = transformers_config(json.loads((folder / "config.json").read_text()))
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
        folder, config=config, dtype=dtype, output_loading_info=True
    )
    model, report = loaded
    missing = [key for key in report["missing_keys"] if "vision" not in key]
    if missing or report["unexpected_keys"] or report["mismatched_keys"]:
        raise ValueError(f"{folder}: missing {missing}, unexpected {report['unexpected_keys']}")
    return model.train(False)
