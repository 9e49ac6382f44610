"""The vision tower: its configuration, and the names and shapes of its tensors.

Read from `vision_config` of config.json when images are asked for: a checkpoint whose tower is not supported still
serves text. Defaults for absent fields are those of `Gemma4VisionConfig` in transformers 5.23; what would change the
mathematics is an error that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dgemma_ext.checkpoint.json_section import Section

_PREFIX = "model.encoder."
PATCH = 16  # pixels of a patch's side
POOL = 3  # patches of a cell's side; a cell becomes one soft token
# Numbers of soft tokens that an image may take at most; the model was trained with these.
SOFT_TOKENS = (70, 140, 280, 560, 1120)
_MAX_LAYERS = 1_000

_NEUTRAL_FIELDS: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "model_type": ("gemma4_vision",),
    "patch_size": (PATCH,),
    "pooling_kernel_size": (POOL,),
    "use_clipped_linears": (False, None),
}


@dataclass(frozen=True)
class VisionConfig:
    """Sizes are in elements. position_embeddings: columns or rows of patches that an image may have at most."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    standardize: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VisionConfig:
        """Reads the parsed `vision_config`; raises ValueError naming the field."""
        section = Section("vision_config", config)
        section.check_neutral(_NEUTRAL_FIELDS)
        heads = section.integer("num_attention_heads", 12)
        if section.integer("num_key_value_heads", heads) != heads:
            raise section.error("num_key_value_heads", f"num_attention_heads, which is {heads}")
        head_dim = section.integer("head_dim")
        if head_dim % 4:
            raise section.error("head_dim", "a multiple of 4: columns and rows of patches turn half of a head each")
        standardize = section.get("standardize", False)
        if not isinstance(standardize, bool):
            raise section.error("standardize", "true or false")
        return cls(
            hidden_size=section.integer("hidden_size", 768),
            intermediate_size=section.integer("intermediate_size", 3072),
            num_layers=section.integer("num_hidden_layers", 16, maximum=_MAX_LAYERS),
            num_heads=heads,
            head_dim=head_dim,
            position_embeddings=section.integer("position_embedding_size", 10_240),
            rope_theta=_rope_theta(section),
            rms_norm_eps=section.number("rms_norm_eps", 1e-6, zero=True),
            standardize=standardize,
        )


def _rope_theta(section: Section) -> float:
    """Whatever name the file gives it, the rotation is by columns and rows ("axial")."""
    rope = section.get("rope_parameters")
    if rope is None:
        return section.number("rope_theta", 100.0)
    parameters = Section(section.path("rope_parameters"), rope)
    if parameters.get("rope_type", "default") not in ("default", "axial"):
        raise parameters.error("rope_type", "default or axial")
    return parameters.number("rope_theta", 100.0)


def vision_tensors(config: VisionConfig, text_hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the tower and its projector to the text model's hidden size."""
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    tower = f"{_PREFIX}vision_tower."
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}patch_embedder.input_proj.weight": (hidden, 3 * PATCH**2),
        f"{tower}patch_embedder.position_embedding_table": (2, config.position_embeddings, hidden),
        f"{_PREFIX}embed_vision.embedding_projection.weight": (text_hidden_size, hidden),
    }
    if config.standardize:
        shapes |= {f"{tower}std_bias": (hidden,), f"{tower}std_scale": (hidden,)}
    for layer in range(config.num_layers):
        prefix = f"{tower}encoder.layers.{layer}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{prefix}{norm}_layernorm.weight"] = (hidden,)
        for name in "qkv":
            shapes[f"{prefix}self_attn.{name}_proj.linear.weight"] = (heads, hidden)
        shapes[f"{prefix}self_attn.o_proj.linear.weight"] = (hidden, heads)
        shapes[f"{prefix}self_attn.q_norm.weight"] = shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
        for name in ("gate", "up"):
            shapes[f"{prefix}mlp.{name}_proj.linear.weight"] = (config.intermediate_size, hidden)
        shapes[f"{prefix}mlp.down_proj.linear.weight"] = (hidden, config.intermediate_size)
    return shapes
