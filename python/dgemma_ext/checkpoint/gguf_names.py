"""The names of tensors in GGUF files of the architecture diffusion-gemma, and those of the published layout."""

from __future__ import annotations

import re

# Both names are without ".weight" where the published one has it.
_MODEL = {
    "token_embd": "model.decoder.embed_tokens.weight",
    "output_norm": "model.decoder.norm.weight",
    "self_cond_pre_norm": "model.decoder.self_conditioning.pre_norm.weight",
    "self_cond_gate": "model.decoder.self_conditioning.gate_proj.weight",
    "self_cond_up": "model.decoder.self_conditioning.up_proj.weight",
    "self_cond_down": "model.decoder.self_conditioning.down_proj.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "attn_q": "self_attn.q_proj.weight",
    "attn_k": "self_attn.k_proj.weight",
    "attn_v": "self_attn.v_proj.weight",
    "attn_q_norm": "self_attn.q_norm.weight",
    "attn_k_norm": "self_attn.k_norm.weight",
    "attn_output": "self_attn.o_proj.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "ffn_gate": "mlp.gate_proj.weight",
    "ffn_up": "mlp.up_proj.weight",
    "ffn_down": "mlp.down_proj.weight",
    "post_ffw_norm_1": "post_feedforward_layernorm_1.weight",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2.weight",
    "ffn_gate_inp": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps": "experts.gate_up_proj",
    "ffn_down_exps": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "post_ffw_norm_2": "post_feedforward_layernorm_2.weight",
    "post_ffw_norm": "post_feedforward_layernorm.weight",
    "layer_output_scale": "layer_scalar",
}
_ENCODER_SCALE = "enc_layer_output_scale"
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# Frequency factors of rotary embedding, which the configuration has instead (gguf_settings.py).
ROPE_FACTORS = "rope_freqs"


def published_name_of(name: str) -> str | None:
    """The published name of a tensor of a GGUF file; None for one that has none."""
    plain = name.removesuffix(".weight")
    block = _BLOCK.fullmatch(plain)
    if block is None:
        return _MODEL.get(plain)
    if block[2] == _ENCODER_SCALE:
        return f"model.encoder.language_model.layers.{block[1]}.layer_scalar"
    return f"model.decoder.layers.{block[1]}.{_LAYER[block[2]]}" if block[2] in _LAYER else None


def gguf_name_of(published: str) -> str:
    """The inverse, as the published conversions write it; raises KeyError for a name that has none."""
    scalar = re.fullmatch(r"model\.encoder\.language_model\.layers\.(\d+)\.layer_scalar", published)
    if scalar is not None:
        return f"blk.{scalar[1]}.{_ENCODER_SCALE}.weight"
    layer = re.fullmatch(r"model\.decoder\.layers\.(\d+)\.(.+)", published)
    table = _MODEL if layer is None else _LAYER
    wanted = published if layer is None else layer[2]
    plain = {name: gguf for gguf, name in table.items()}[wanted]
    suffix = "" if plain.endswith(".scale") else ".weight"
    return (plain if layer is None else f"blk.{layer[1]}.{plain}") + suffix
