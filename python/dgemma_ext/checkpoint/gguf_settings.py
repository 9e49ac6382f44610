"""config.json and generation_config.json of what a GGUF file's metadata say."""

from __future__ import annotations

from typing import Any

from dgemma_ext.checkpoint.config import FULL, SLIDING
from dgemma_ext.checkpoint.gguf_fields import Fields, plain
from dgemma_ext.checkpoint.gguf_file import GgufFile, read_tensor
from dgemma_ext.checkpoint.gguf_names import ROPE_FACTORS
from dgemma_ext.errors import CheckpointError

ARCHITECTURE = "diffusion-gemma"
# A pair with a factor this large does not rotate: llama.cpp divides its frequency by it (the conversions write 1e30).
_NO_ROTATION = 1e20
# Tokens that end an answer beside the end-of-sequence token, as the published generation_config.json has them.
_ENDS = ("<turn|>", "<|tool_response>")


def check_architecture(file: GgufFile) -> None:
    """Raises CheckpointError for another model."""
    found = file.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise CheckpointError(f"holds a model of the architecture {found}; wanted: {ARCHITECTURE}", file=file.path)


def config_of(file: GgufFile) -> dict[str, Any]:
    """A config.json as the published one is written. Raises CheckpointError naming the key that is missing or does not
    fit."""
    fields = Fields(file, f"{ARCHITECTURE}.")
    layers = fields.integer("block_count")
    if not 1 <= layers <= len(file.tensors):
        raise fields.error("block_count", f"at least 1 and no more than the file's {len(file.tensors)} tensors")
    sliding = _by_layer(fields, "attention.sliding_window_pattern", bool, layers)
    heads = _by_layer(fields, "attention.head_count_kv", int, layers)
    types = [SLIDING if is_sliding else FULL for is_sliding in sliding]
    key_heads = {kind: {count for count, own in zip(heads, types, strict=True) if own == kind} for kind in types}
    for kind, counts in key_heads.items():
        if len(counts) != 1:
            raise fields.error("attention.head_count_kv", f"one number for all layers of the kind {kind}")
    full_dim, sliding_dim = fields.integer("attention.key_length"), fields.integer("attention.key_length_swa")
    if full_dim < 2 or full_dim % 2:
        raise fields.error("attention.key_length", "an even number")
    theta = fields.number("rope.freq_base")
    text: dict[str, Any] = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": _vocabulary(file),
        "hidden_size": fields.integer("embedding_length"),
        "intermediate_size": fields.integer("feed_forward_length"),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
        "num_experts": fields.integer("expert_count"),
        "top_k_experts": fields.integer("expert_used_count"),
        "num_hidden_layers": layers,
        "num_attention_heads": fields.integer("attention.head_count"),
        "num_key_value_heads": next(iter(key_heads.get(SLIDING, key_heads[FULL]))),
        "num_global_key_value_heads": next(iter(key_heads[FULL])) if FULL in key_heads else None,
        "head_dim": sliding_dim,
        "global_head_dim": full_dim,
        "sliding_window": fields.integer("attention.sliding_window"),
        "layer_types": types,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "final_logit_softcapping": fields.number("final_logit_softcapping"),
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": "vision",
        "tie_word_embeddings": True,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa")},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": theta,
                "partial_rotary_factor": _rotating(file, full_dim // 2, FULL in types) / (full_dim // 2),
            },
        },
        **_token_ids(file),
        "dtype": "bfloat16",
    }
    _check_neutral(fields, full_dim, sliding_dim)
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": Fields(file).integer("diffusion.canvas_length", 256),
        "eos_token_id": _ends(file),
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": None,
    }


def _check_neutral(fields: Fields, full_dim: int, sliding_dim: int) -> None:
    """Raises CheckpointError for settings with which llama.cpp computes something that this engine does not."""
    for suffix, width in (("", full_dim), ("_swa", sliding_dim)):
        for key in ("attention.value_length", "rope.dimension_count"):
            fields.check(key + suffix, width)
    for key in ("attention.shared_kv_layers", "embedding_length_per_layer_input"):
        fields.check(key, 0)
    fields.check("attention.causal", False)
    fields.check("rope.scaling.type", "none")


def _by_layer(fields: Fields, key: str, kind: type, layers: int) -> list[Any]:
    """One entry for each layer. A single number stands for all; in a pattern it would be a period, which no file of the
    architecture has."""
    value = fields.get(key)
    if kind is int and type(value) is int:
        return [value] * layers
    if not isinstance(value, list) or len(value) != layers or any(type(entry) is not kind for entry in value):
        raise fields.error(key, f"a list of {layers} entries")
    return value


def generation_of(file: GgufFile) -> dict[str, Any]:
    """A generation_config.json: the file's diffusion.eb_* settings, and no others, so that the defaults hold."""
    metadata = file.metadata
    names = {
        "eb_max_steps": "max_denoising_steps",
        "eb_t_min": "t_min",
        "eb_t_max": "t_max",
        "eb_stability_threshold": "stability_threshold",
        "eb_confidence_threshold": "confidence_threshold",
    }
    settings: dict[str, Any] = {
        name: plain(metadata[f"diffusion.{key}"]) for key, name in names.items() if f"diffusion.{key}" in metadata
    }
    if "diffusion.eb_entropy_bound" in metadata:
        settings["sampler_config"] = {"entropy_bound": plain(metadata["diffusion.eb_entropy_bound"])}
    return {**settings, "eos_token_id": _ends(file), "pad_token_id": _token_ids(file).get("pad_token_id")}


def _rotating(file: GgufFile, pairs: int, wanted: bool) -> int:
    """How many pairs of a full layer's head rotate: the first ones, whose factor is 1."""
    info = file.tensors.get(f"{ROPE_FACTORS}.weight") or file.tensors.get(ROPE_FACTORS)
    if info is None:
        if wanted:
            raise CheckpointError("is missing", file=file.path, tensor=f"{ROPE_FACTORS}.weight")
        return pairs
    factors = read_tensor(info).flatten().tolist()
    count = sum(factor == 1.0 for factor in factors)
    if len(factors) != pairs or any(factor < _NO_ROTATION for factor in factors[count:]):
        raise CheckpointError(
            f"has {len(factors)} factors; wanted: {pairs}, each 1 and from some place on very large",
            file=file.path,
            tensor=info.name,
        )
    return count


def _vocabulary(file: GgufFile) -> int:
    return len(Fields(file).entries("tokenizer.ggml.tokens", str, "the tokenizer's tokens"))


def _token_ids(file: GgufFile) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    fields, count = Fields(file), _vocabulary(file)
    found = {name: fields.index(f"tokenizer.ggml.{key}_token_id", count) for key, name in names.items()}
    return {name: token for name, token in found.items() if token is not None}


def _ends(file: GgufFile) -> list[int]:
    tokens = file.metadata["tokenizer.ggml.tokens"]
    ends = [tokens.index(token) for token in _ENDS if token in tokens]
    return list(dict.fromkeys([_token_ids(file).get("eos_token_id", 1), *ends]))
