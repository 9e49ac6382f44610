"""The parts of a denoising step, and the weights and operators of each."""

from __future__ import annotations

from enum import Enum

from dgemma_ext.checkpoint import PARTS


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

# Operators of `torch.ops.dgemma` whose part does not follow from a weight.
PART_OF_OPERATOR: dict[str, Part] = {
    "vocabulary_statistics": Part.SAMPLING,
    "sample": Part.SAMPLING,
    "merge_vocabulary_shards": Part.SAMPLING,
    "update_canvas_": Part.SAMPLING,
    "noise_": Part.SAMPLING,
    "class_statistics_": Part.SAMPLING,
    "constrain_": Part.SAMPLING,
    "sample_class_": Part.SAMPLING,
    "soft_embedding": Part.SOFT_EMBEDDING,
}


_PARTS_OF_LAYERS = {"experts": Part.EXPERTS, "attention": Part.PROJECTIONS, "mlp": Part.MLP}


def part_of_weight(attribute: str) -> Part:
    """The part that uses a weight, by its attribute of LayerWeights or ModelWeights.

    The token embedding is used by three parts; recorder.py tells which.
    """
    if attribute == "embed_tokens":
        return Part.HEAD
    if attribute.startswith("self_conditioning_"):
        return Part.EMBEDDING
    if attribute.startswith("router_"):
        return Part.ROUTER
    if "norm" in attribute:
        return Part.NORMS
    return next(_PARTS_OF_LAYERS[part] for part, attributes in PARTS.items() if attribute in attributes)
