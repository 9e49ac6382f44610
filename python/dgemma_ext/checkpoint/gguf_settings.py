"""config.json and generation_config.json of what a GGUF file's metadata say."""

from __future__ import annotations

from typing import Any

from dgemma_ext.checkpoint.config import FULL, SLIDING
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
    fields = _Fields(file)
    layers = fields.integer("block_count")
    sliding = fields.list("attention.sliding_window_pattern", layers)
    heads = fields.list("attention.head_count_kv", layers)
    types = [SLIDING if is_sliding else FULL for is_sliding in sliding]
    key_heads = {kind: {int(count) for count, own in zip(heads, types, strict=True) if own == kind} for kind in types}
    for kind, counts in key_heads.items():
        if len(counts) != 1:
            raise fields.error("attention.head_count_kv", f"one number for all layers of the kind {kind}")
    full_dim = fields.integer("attention.key_length")
    theta = fields.number("rope.freq_base")
    text: dict[str, Any] = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": len(fields.list_of("tokenizer.ggml.tokens")),
        "hidden_size": fields.integer("embedding_length"),
        "intermediate_size": fields.integer("feed_forward_length"),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
        "num_experts": fields.integer("expert_count"),
        "top_k_experts": fields.integer("expert_used_count"),
        "num_hidden_layers": layers,
        "num_attention_heads": fields.integer("attention.head_count"),
        "num_key_value_heads": next(iter(key_heads.get(SLIDING, key_heads[FULL]))),
        "num_global_key_value_heads": next(iter(key_heads[FULL])) if FULL in key_heads else None,
        "head_dim": fields.integer("attention.key_length_swa"),
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
                "partial_rotary_factor": _rotating(file, full_dim // 2) / (full_dim // 2),
            },
        },
        **_token_ids(file),
        "dtype": "bfloat16",
    }
    for key in ("attention.shared_kv_layers", "embedding_length_per_layer_input"):
        if fields.get(key, 0) != 0:
            raise fields.error(key, "0")
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": int(file.metadata.get("diffusion.canvas_length", 256)),
        "eos_token_id": _ends(file),
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": None,
    }


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
        name: _plain(metadata[f"diffusion.{key}"]) for key, name in names.items() if f"diffusion.{key}" in metadata
    }
    if "diffusion.eb_entropy_bound" in metadata:
        settings["sampler_config"] = {"entropy_bound": _plain(metadata["diffusion.eb_entropy_bound"])}
    return {**settings, "eos_token_id": _ends(file), "pad_token_id": _token_ids(file).get("pad_token_id")}


class _Fields:
    """The metadata under the architecture's prefix."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def get(self, key: str, default: Any = None) -> Any:
        return self._file.metadata.get(f"{ARCHITECTURE}.{key}", default)

    def integer(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, "an integer")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(key, "a number")
        return float(_plain(value))

    def list(self, key: str, count: int) -> list[Any]:
        """One entry for each of `count` layers; a single value stands for all."""
        value = self.get(key)
        if isinstance(value, int):
            return [value] * count
        if not isinstance(value, list) or len(value) != count:
            raise self.error(key, f"a list of {count} entries")
        return value

    def list_of(self, key: str) -> Any:
        value = self._file.metadata.get(key)
        if not isinstance(value, list) or not value:
            raise CheckpointError(f"{key} is missing; wanted: the tokenizer's tokens", file=self._file.path)
        return value

    def error(self, key: str, wanted: str) -> CheckpointError:
        name, got = f"{ARCHITECTURE}.{key}", self.get(key)
        state = "is missing" if got is None else f"is {str(got)[:60]}"
        return CheckpointError(f"{name} {state}; wanted: {wanted}", file=self._file.path)


def _rotating(file: GgufFile, pairs: int) -> int:
    """How many pairs of a full layer's head rotate: the first ones, whose factor is 1."""
    info = file.tensors.get(f"{ROPE_FACTORS}.weight") or file.tensors.get(ROPE_FACTORS)
    if info is None:
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


def _token_ids(file: GgufFile) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    keys = {name: f"tokenizer.ggml.{key}_token_id" for key, name in names.items()}
    return {name: int(file.metadata[key]) for name, key in keys.items() if key in file.metadata}


def _ends(file: GgufFile) -> list[int]:
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    ends = [tokens.index(token) for token in _ENDS if token in tokens]
    return list(dict.fromkeys([_token_ids(file).get("eos_token_id", 1), *ends]))


def _plain(value: float) -> float:
    """A float32 as the shortest decimal that rounds to it: 0.1, not 0.10000000149."""
    if not isinstance(value, float):
        return value
    import numpy

    return float(str(numpy.float32(value)))
