"""The parts of a denoising step, and the weights and operators of each."""

from __future__ import annotations

from enum import Enum


class Part(Enum):
    """A part is a row of the table. Its value is the name in JSON, its `label` the name in the table."""

    EMBEDDING = "embedding"
    NORMS = "norms"
    PROJECTIONS = "projections"
    SLIDING = "attention_sliding"
    FULL = "attention_full"
    ROUTER = "router"
    EXPERTS = "experts"
    MLP = "mlp"
    HEAD = "head"
    SAMPLING = "sampling"
    SOFT_EMBEDDING = "soft_embedding"
    OTHER = "other"

    @property
    def label(self) -> str:
        return _LABELS[self]


_LABELS = {
    Part.EMBEDDING: "embedding, self-conditioning",
    Part.NORMS: "norms, residuals",
    Part.PROJECTIONS: "q, k, v, o projections",
    Part.SLIDING: "attention, sliding layers",
    Part.FULL: "attention, full layers",
    Part.ROUTER: "router",
    Part.EXPERTS: "experts",
    Part.MLP: "dense MLP",
    Part.HEAD: "vocabulary head",
    Part.SAMPLING: "statistics, sampling, update",
    Part.SOFT_EMBEDDING: "soft embedding",
    Part.OTHER: "everything else",
}

# Attribute of LayerWeights or ModelWeights → part. The token embedding is used by three parts; recorder.py tells which.
PART_OF_WEIGHT: dict[str, Part] = {
    "embed_tokens": Part.HEAD,
    "norm": Part.NORMS,
    **dict.fromkeys(
        (
            "self_conditioning_pre_norm",
            "self_conditioning_gate_proj",
            "self_conditioning_up_proj",
            "self_conditioning_down_proj",
        ),
        Part.EMBEDDING,
    ),
    **dict.fromkeys(
        (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm_1",
            "pre_feedforward_layernorm_2",
            "post_feedforward_layernorm_2",
            "post_feedforward_layernorm",
            "q_norm",
            "k_norm",
        ),
        Part.NORMS,
    ),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), Part.PROJECTIONS),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), Part.MLP),
    **dict.fromkeys(("router_proj", "router_scale", "router_per_expert_scale"), Part.ROUTER),
    **dict.fromkeys(("experts_gate_up", "experts_down"), Part.EXPERTS),
}

# Operators of `torch.ops.dgemma` whose part does not follow from a weight.
PART_OF_OPERATOR: dict[str, Part] = {
    "vocabulary_statistics": Part.SAMPLING,
    "sample": Part.SAMPLING,
    "update_canvas_": Part.SAMPLING,
    "noise_": Part.SAMPLING,
    "soft_embedding": Part.SOFT_EMBEDDING,
}
