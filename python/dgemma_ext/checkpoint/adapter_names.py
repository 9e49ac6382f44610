"""Which weight of the model a tensor of an adapter belongs to, by the name that PEFT gives it.

A name is base_model.model. + the module's path + .lora_A.weight or .lora_B.weight. The encoder and the decoder share
their weights and not their adapters: each has names of its own.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ENCODER, DECODER = "encoder", "decoder"
PASSES = (ENCODER, DECODER)
# The parameters of the experts, which PEFT names after their module alone (adapter_experts.py).
EXPERTS = "experts"

_NAME = re.compile(r"base_model\.model\.(?:model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_LAYER = re.compile(r"(?P<stack>decoder|encoder\.language_model)\.layers\.(?P<index>\d{1,6})\.(?P<block>.+)")
_VISION = re.compile(r"base_model\.model\.(?:model\.)?encoder\.(?:vision_tower|embed_vision)\.")
_SELF_CONDITIONING = "decoder.self_conditioning."

# Module inside a layer → attribute of LayerWeights.
LAYER_MODULES = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "o_proj",
    "mlp.gate_proj": "gate_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "down_proj",
    "router.proj": "router_proj",
    "experts": EXPERTS,
    "experts.base_layer": EXPERTS,
}
# Module of the self-conditioning → attribute of ModelWeights.
MODEL_MODULES = {name: f"self_conditioning_{name}" for name in ("gate_proj", "up_proj", "down_proj")}

# Parts of names of what is not supported → what it is.
_NOT_SUPPORTED = (
    ("lora_magnitude_vector", "is a magnitude of DoRA, which is not supported"),
    ("lora_embedding_", "adapts an embedding, which is not supported"),
    ("embed_tokens", "adapts the embedding, which is not supported"),
    ("lm_head", "adapts the head, which is not supported"),
    ("modules_to_save", "is a whole module (modules_to_save), which is not supported"),
    ("trainable_tokens", "is rows of the embedding (trainable_token_indices), which is not supported"),
    (".bias", "is a bias, which is not supported"),
)


class Place(NamedTuple):
    """Where a factor belongs. layer: None for the self-conditioning. attribute: of LayerWeights or ModelWeights, or
    EXPERTS. module: its path in transformers' model."""

    stack: str
    layer: int | None
    attribute: str
    module: str


def place_of(name: str, layers: int) -> tuple[Place, str]:
    """The place of a tensor and which factor it is, "A" or "B". Raises ValueError, saying why, for a name that has none
    in a model of so many layers."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(_reason(name))
    module, factor = found["module"], found["factor"]
    if module.startswith(_SELF_CONDITIONING):
        attribute = MODEL_MODULES.get(module.removeprefix(_SELF_CONDITIONING))
        if attribute is not None:
            return Place(DECODER, None, attribute, f"model.{module}"), factor
    layer = _LAYER.fullmatch(module)
    attribute = None if layer is None else LAYER_MODULES.get(layer["block"])
    if layer is None or attribute is None:
        raise ValueError(_reason(name))
    index = int(layer["index"])
    if index >= layers:
        raise ValueError(f"is of layer {index}, and the model has {layers}")
    return Place(DECODER if layer["stack"] == "decoder" else ENCODER, index, attribute, f"model.{module}"), factor


def is_vision(name: str) -> bool:
    """Whether a tensor belongs to the vision tower or its projector, whose adapters are not used."""
    return _VISION.match(name) is not None


def _reason(name: str) -> str:
    for part, reason in _NOT_SUPPORTED:
        if part in name:
            return reason
    return "is not a factor of an adapter of this model"
