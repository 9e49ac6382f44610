"""The configuration of a model: reads config.json, checks every field and resolves the settings of each layer.

Two forms of the text configuration are read: the flat one of the published file (`global_head_dim` and
`num_global_key_value_heads` for the full-attention layers), and `per_layer_config`, a map from layer index to
overrides, which transformers writes. Defaults for absent fields are those of `DiffusionGemmaTextConfig` in
transformers' configuration_diffusion_gemma.py. A value that this engine does not implement is an error that names the
field.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dgemma_ext.checkpoint.json_section import Section, json_file, read_json
from dgemma_ext.checkpoint.quantization import check_quantization_config
from dgemma_ext.errors import CheckpointError

SLIDING = "sliding_attention"
FULL = "full_attention"

# Every sixth layer has full attention where the file gives no layer_types.
_DEFAULT_PATTERN = 6

# A float16 checkpoint runs in bfloat16, because activations of this model overflow float16.
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.bfloat16}

_DEFAULT_HEADS = {"head_dim": 256, "num_key_value_heads": 4}

_DEFAULT_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}

# More than any model has: a corrupt number must not keep the loader busy for hours.
_MAX_LAYERS, _MAX_EXPERTS = 1_000, 1_024

# Fields of related models that change the mathematics, with the values that do not.
_NEUTRAL_TEXT_FIELDS: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_chunk_size": (None,),
    "attention_k_eq_v": (True, None),
    "attn_logit_softcapping": (None,),
    "enable_moe_block": (True, None),
    "hidden_size_per_layer_input": (0, None),
    "num_kv_shared_layers": (0, None),
    "quantization_config": (None,),
    "rope_local_base_freq": (None,),
    "rope_scaling": (None,),
    "rope_theta": (None,),
    "tie_word_embeddings": (True, None),
    "use_double_wide_mlp": (False, None),
}
_NEUTRAL_TOP_FIELDS: dict[str, tuple[Any, ...]] = {
    "audio_config": (None,),
    "tie_word_embeddings": (True, None),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one layer.

    `rope_type` is "default" (all dimensions rotate) or "proportional" (only the first `partial_rotary_factor` of the
    pairs rotate, with frequencies spaced as if all did). `factor` divides every frequency (proportional only).
    """

    rope_type: str
    theta: float
    partial_rotary_factor: float = 1.0
    factor: float = 1.0

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """The angle per position of each pair (i, i + head_dim/2): fp32 [head_dim / 2], zero for those that stay.

        Formulas: `compute_default_rope_parameters` in transformers' modeling_diffusion_gemma.py and
        `_compute_proportional_rope_parameters` in its modeling_rope_utils.py, in their order of operations, so that
        the values are equal bit for bit.
        """
        rotating = int(self.partial_rotary_factor * head_dim // 2)  # all of them for "default"
        exponents = torch.arange(0, 2 * rotating, 2, dtype=torch.float32, device="cpu") / head_dim
        frequencies = torch.zeros(head_dim // 2, dtype=torch.float32, device="cpu")
        frequencies[:rotating] = 1.0 / (self.theta**exponents)
        return frequencies / self.factor


@dataclass(frozen=True)
class LayerConfig:
    """The attention of one layer. `sliding_window` is 0 on a full-attention layer."""

    index: int
    is_sliding: bool
    head_dim: int
    num_key_value_heads: int
    sliding_window: int
    k_eq_v: bool
    rope: RopeConfig


@dataclass(frozen=True)
class ModelConfig:
    """The fields of config.json that the engine uses. Sizes are in elements, token ids are vocabulary indices."""

    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k_experts: int
    vocab_size: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    final_logit_softcapping: float
    canvas_length: int
    hidden_activation: str
    bidirectional_attention: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: torch.dtype
    layers: tuple[LayerConfig, ...]
    vision: dict[str, Any] | None
    image_token_id: int | None
    boi_token_id: int | None
    eoi_token_id: int | None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Reads config.json from its path or its folder; raises CheckpointError naming the file and the field."""
        file = json_file(path, "config.json")
        try:
            return cls.from_dict(read_json(file))
        except ValueError as error:
            raise CheckpointError(str(error), file=file) from error

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads the parsed config.json; raises ValueError naming the field."""
        top = Section("", config)
        if top.get("model_type", "diffusion_gemma") != "diffusion_gemma":
            raise top.error("model_type", "diffusion_gemma")
        top.check_neutral(_NEUTRAL_TOP_FIELDS)
        check_quantization_config(top.get("quantization_config", top.get("quantization")))
        if top.get("text_config") is None:
            raise ValueError("text_config is missing")
        text = Section("text_config", top.get("text_config"))
        if text.get("model_type", "diffusion_gemma_text") != "diffusion_gemma_text":
            raise text.error("model_type", "diffusion_gemma_text")
        text.check_neutral(_NEUTRAL_TEXT_FIELDS)
        if text.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise text.error("hidden_activation", "gelu_pytorch_tanh")
        # "vision" differs from null only where there are images; "all" would make the prompt bidirectional.
        if text.get("use_bidirectional_attention") not in (None, "vision"):
            raise text.error("use_bidirectional_attention", "null or vision")
        vision = top.get("vision_config")
        if vision is not None and not isinstance(vision, Mapping):
            raise top.error("vision_config", "an object or null")

        text_eos = text.token_ids("eos_token_id", 1)
        num_experts = text.integer("num_experts", maximum=_MAX_EXPERTS)
        top_k_experts = text.integer("top_k_experts")
        if top_k_experts > num_experts:
            raise text.error("top_k_experts", f"at most num_experts, which is {num_experts}")
        return cls(
            hidden_size=text.integer("hidden_size", 2304),
            intermediate_size=text.integer("intermediate_size", 9216),
            moe_intermediate_size=text.integer("moe_intermediate_size"),
            num_experts=num_experts,
            top_k_experts=top_k_experts,
            vocab_size=text.integer("vocab_size", 262_144),
            num_attention_heads=text.integer("num_attention_heads", 8),
            max_position_embeddings=text.integer("max_position_embeddings", 131_072),
            rms_norm_eps=text.number("rms_norm_eps", 1e-6, zero=True),
            final_logit_softcapping=text.number("final_logit_softcapping", 30.0),
            canvas_length=top.integer("canvas_length", 256),
            hidden_activation="gelu_pytorch_tanh",
            bidirectional_attention=text.get("use_bidirectional_attention"),
            bos_token_id=text.token_id("bos_token_id", 2),
            eos_token_ids=top.token_ids("eos_token_id") or text_eos,
            pad_token_id=text.token_id("pad_token_id", 0),
            dtype=_dtype(top, text),
            layers=_layers(text),
            vision=None if vision is None else dict(vision),
            image_token_id=top.token_id("image_token_id", 258_880),
            boi_token_id=top.token_id("boi_token_id", 255_999),
            eoi_token_id=top.token_id("eoi_token_id", 258_882),
        )


def _dtype(top: Section, text: Section) -> torch.dtype:
    """The dtype that the file declares; bfloat16, as published, where it declares none."""
    for section in (top, text):
        for field in ("dtype", "torch_dtype"):
            name = section.get(field)
            if name is not None:
                if not isinstance(name, str) or name not in _DTYPES:
                    raise section.error(field, " or ".join(_DTYPES))
                return _DTYPES[name]
    return torch.bfloat16


def _layers(text: Section) -> tuple[LayerConfig, ...]:
    types = _layer_types(text)
    overrides = _layer_overrides(text, types)
    rope = _rope_by_type(text, types)
    num_attention_heads = text.integer("num_attention_heads", 8)
    window = text.integer("sliding_window", 512) if SLIDING in types else 0
    layers = []
    for index, layer_type in enumerate(types):
        values = {
            **{field: text.integer(field, default) for field, default in _DEFAULT_HEADS.items()},
            "sliding_window": window,
            **overrides.get(index, {}),
        }
        head_dim, num_key_value_heads = values["head_dim"], values["num_key_value_heads"]
        where = f"{text.name}: layer {index} ({layer_type})"
        if head_dim % 2:
            raise ValueError(f"{where} has head_dim {head_dim}; supported: even sizes, which rotary embedding needs")
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"{where} has num_key_value_heads {num_key_value_heads}; supported: a divisor of "
                f"num_attention_heads, which is {num_attention_heads}"
            )
        is_sliding = layer_type == SLIDING
        if is_sliding and values["sliding_window"] == 0:
            raise ValueError(f"{where} has sliding_window null; supported: an integer of at least 1")
        layers.append(
            LayerConfig(
                index=index,
                is_sliding=is_sliding,
                head_dim=head_dim,
                num_key_value_heads=num_key_value_heads,
                sliding_window=values["sliding_window"] if is_sliding else 0,
                k_eq_v=not is_sliding,
                rope=rope[layer_type],
            )
        )
    return tuple(layers)


def _layer_types(text: Section) -> list[str]:
    count = text.integer("num_hidden_layers", 30, maximum=_MAX_LAYERS)
    given = text.get("layer_types")
    if given is None:
        types = [FULL if (index + 1) % _DEFAULT_PATTERN == 0 else SLIDING for index in range(count)]
    else:
        if not isinstance(given, list) or any(name not in (SLIDING, FULL) for name in given):
            raise text.error("layer_types", f"a list of {SLIDING} and {FULL}")
        if len(given) != count:
            raise ValueError(f"{text.path('layer_types')} has {len(given)} entries; num_hidden_layers is {count}")
        types = list(given)
    if types[-1] != FULL:
        # transformers makes the last layer a full one, whatever the file says.
        if given is not None:
            warnings.warn(f"{text.path('layer_types')} ends in {types[-1]}; it is read as {FULL}", stacklevel=2)
        types[-1] = FULL
    return types


def _layer_overrides(text: Section, types: list[str]) -> dict[int, dict[str, int]]:
    """Layer index → values that replace the common head_dim, num_key_value_heads and sliding_window."""
    flat: dict[str, int] = {}
    if "per_layer_config" not in text.values or "global_head_dim" in text.values:
        flat["head_dim"] = text.integer("global_head_dim", 512)
    if text.get("num_global_key_value_heads") is not None:
        flat["num_key_value_heads"] = text.integer("num_global_key_value_heads")
    if "per_layer_config" not in text.values:
        return {index: flat for index, layer_type in enumerate(types) if layer_type == FULL}

    resolved: dict[int, dict[str, int]] = {}
    per_layer = Section(text.path("per_layer_config"), text.get("per_layer_config") or {})
    for key, values in per_layer.values.items():
        if not str(key).isdecimal() or int(key) >= len(types):
            raise ValueError(f"{per_layer.name} has the key {key!r}; supported: layer indices below {len(types)}")
        resolved[int(key)] = _one_layer_overrides(Section(per_layer.path(str(key)), values), text)
    # A file with both forms is accepted when they agree.
    for index, layer_type in enumerate(types):
        for field, value in flat.items() if layer_type == FULL else ():
            actual = resolved.get(index, {}).get(field, text.get(field, _DEFAULT_HEADS[field]))
            if actual != value:
                raise ValueError(f"{per_layer.name} gives layer {index} {field} {actual}, the flat fields give {value}")
    return resolved


def _one_layer_overrides(layer: Section, text: Section) -> dict[str, int]:
    overrides: dict[str, int] = {}
    for field, value in layer.values.items():
        if field in ("head_dim", "num_key_value_heads"):
            overrides[field] = layer.integer(field)
        elif field == "sliding_window":
            # A full-attention layer may have null here.
            overrides[field] = 0 if value is None else layer.integer(field)
        elif not (value == [] if field == "skip" else field in text.values and text.values[field] == value):
            raise layer.error(field, "overrides of head_dim, num_key_value_heads and sliding_window only")
    return overrides


def _rope_by_type(text: Section, types: list[str]) -> dict[str, RopeConfig]:
    given = text.get("rope_parameters")
    by_type = Section(text.path("rope_parameters"), _DEFAULT_ROPE if given is None else given)
    for key in by_type.values:
        if key not in (SLIDING, FULL):
            raise by_type.error(key, f"one object for {SLIDING} and one for {FULL}")
    for layer_type in sorted(set(types)):
        if by_type.get(layer_type) is None:
            raise ValueError(f"{by_type.path(layer_type)} is missing")
    return {layer_type: _rope(Section(by_type.path(layer_type), by_type.get(layer_type))) for layer_type in set(types)}


def _rope(rope: Section) -> RopeConfig:
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
    for field in rope.values:
        if field not in known:
            raise rope.error(field, "a rotary embedding without it")
    kind_field = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.get(kind_field, "default")
    if kind not in ("default", "proportional"):
        raise rope.error(kind_field, "default or proportional")
    config = RopeConfig(
        rope_type=kind,
        theta=rope.number("rope_theta"),
        partial_rotary_factor=rope.number("partial_rotary_factor", 1.0, zero=True),
        factor=rope.number("factor", 1.0),
    )
    if config.partial_rotary_factor > 1.0 or (kind == "default" and config.partial_rotary_factor != 1.0):
        raise rope.error("partial_rotary_factor", "1 with rope_type default, at most 1 with proportional")
    if kind == "default" and config.factor != 1.0:
        raise rope.error("factor", "1 with rope_type default")
    return config
