"""GGUF files for tests, as the published conversions are, written by the format's own package from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor

from dgemma_ext.checkpoint.gguf_names import gguf_name_of

PREFIX = "diffusion-gemma."
Kinds = Callable[[str, Tensor], str]


def kinds_of(wanted: str) -> Kinds:
    """The types as llama.cpp's quantizer gives them: matrices in the wanted one, in Q5_0 (of 4 bits) or Q8_0 where its
    block of 256 does not divide the columns, BF16 where no block does, and everything else in F32."""

    def kind(name: str, tensor: Tensor) -> str:
        if tensor.dim() < 2 or "ffn_gate_inp" in name:
            return "F32"
        for candidate in (wanted, "Q5_0" if wanted.startswith("Q4") else "Q8_0"):
            if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[candidate]][0] == 0:
                return candidate
        return "BF16"

    return kind


def metadata_of(folder: Path) -> dict[str, Any]:
    """The keys of the published conversions, for a checkpoint's config.json and tokenizer.json."""
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    sliding = [kind == "sliding_attention" for kind in text["layer_types"]]
    full_heads = text.get("num_global_key_value_heads", text["num_key_value_heads"])
    rope = text["rope_parameters"]
    fields = {
        "block_count": text["num_hidden_layers"],
        "context_length": text["max_position_embeddings"],
        "embedding_length": text["hidden_size"],
        "feed_forward_length": text["intermediate_size"],
        "expert_feed_forward_length": text["moe_intermediate_size"],
        "expert_count": text["num_experts"],
        "expert_used_count": text["top_k_experts"],
        "attention.head_count": text["num_attention_heads"],
        "attention.head_count_kv": [text["num_key_value_heads"] if own else full_heads for own in sliding],
        "attention.key_length": text["global_head_dim"],
        "attention.value_length": text["global_head_dim"],
        "attention.key_length_swa": text["head_dim"],
        "attention.value_length_swa": text["head_dim"],
        "rope.dimension_count": text["global_head_dim"],
        "rope.dimension_count_swa": text["head_dim"],
        "rope.freq_base": float(rope["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
        "attention.sliding_window": text["sliding_window"],
        "attention.sliding_window_pattern": sliding,
        "attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
        "final_logit_softcapping": text["final_logit_softcapping"],
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "attention.causal": False,
    }
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, special = tokenizer["model"]["vocab"], {token["content"] for token in tokenizer["added_tokens"]}
    ids = dict(vocabulary) | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    spaced = [token if token in special else token.replace(" ", "▁") for token in tokens]
    merges = [" ".join(half.replace(" ", "▁") for half in pair) for pair in tokenizer["model"]["merges"]]
    template = folder / "chat_template.jinja"
    return {
        **{PREFIX + name: value for name, value in fields.items()},
        "diffusion.canvas_length": config["canvas_length"],
        "diffusion.eb_max_steps": 40,
        "diffusion.eb_entropy_bound": 0.1,
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": spaced,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
        **({"tokenizer.chat_template": template.read_text()} if template.exists() else {}),
    }


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """By their names in GGUF; without the vision tower, and with the factors of rotary embedding."""
    config = json.loads((folder / "config.json").read_text())["text_config"]
    stored = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    vision = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
    found = {gguf_name_of(name): value for name, value in stored.items() if not name.startswith(vision)}
    pairs = config["global_head_dim"] // 2
    factors = torch.full((pairs,), 1e30)
    factors[: int(config["rope_parameters"]["full_attention"]["partial_rotary_factor"] * pairs)] = 1.0
    return {**found, "rope_freqs.weight": factors}


def q4_k_blocks(values: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """Q4_K, for which the package has no quantizer: of 256 values eight groups of 32, each with a 6-bit scale and a
    6-bit least value, under two numbers of float16."""
    rows = values.reshape(-1, 256)
    groups = rows.reshape(-1, 8, 32)
    least = numpy.minimum(groups.min(-1), 0)
    step = (groups.max(-1) - least) / 15
    d = (step.max(-1) / 63).astype(numpy.float16)
    dmin = ((-least).max(-1) / 63).astype(numpy.float16)
    wide_d, wide_min = (numpy.where(x == 0, 1, x).astype(numpy.float32)[:, None] for x in (d, dmin))
    scales = numpy.clip(numpy.rint(step / wide_d), 0, 63).astype(numpy.uint8)
    mins = numpy.clip(numpy.rint(-least / wide_min), 0, 63).astype(numpy.uint8)
    unit = d.astype(numpy.float32)[:, None] * scales
    shifted = groups + (dmin.astype(numpy.float32)[:, None] * mins)[..., None]
    codes = numpy.clip(numpy.rint(shifted / numpy.where(unit == 0, 1, unit)[..., None]), 0, 15).astype(numpy.uint8)
    packed = numpy.empty((len(rows), 12), dtype=numpy.uint8)
    packed[:, :4] = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    packed[:, 4:8] = mins[:, :4] | (mins[:, 4:] >> 4) << 6
    packed[:, 8:] = (scales[:, 4:] & 15) | (mins[:, 4:] & 15) << 4
    nibbles = codes.reshape(-1, 4, 2, 32)
    halves = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).reshape(-1, 128)
    bytes_of = [d[:, None].view(numpy.uint8), dmin[:, None].view(numpy.uint8), packed, halves]
    return numpy.concatenate(bytes_of, axis=-1)


def stored_form(tensor: Tensor, kind: str) -> numpy.ndarray[Any, Any]:
    """The bytes of a tensor in a type, [.., bytes of a row]; of Q5_K and Q6_K random ones that are numbers."""
    values = tensor.float().numpy()
    if kind == "F32":
        return values
    wanted = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[wanted]
    shape = (*values.shape[:-1], values.shape[-1] // block * size)
    if kind == "Q4_K":
        return q4_k_blocks(values).reshape(shape)
    if kind in ("Q5_K", "Q6_K"):
        made = numpy.random.default_rng(7).integers(0, 256, (values.size // block, size), dtype=numpy.uint8)
        scale = numpy.array([0.003], dtype=numpy.float16).view(numpy.uint8)
        made[:, (slice(0, 2) if kind == "Q5_K" else slice(size - 2, size))] = scale
        if kind == "Q5_K":
            made[:, 2:4] = scale
        return made.reshape(shape)
    return gguf.quantize(values, wanted)


def write_gguf(
    folder: Path,
    file: Path,
    kinds: Kinds,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    architecture: str = "diffusion-gemma",
) -> dict[str, tuple[str, numpy.ndarray[Any, Any]]]:
    """Writes a checkpoint as GGUF; returns the type and the bytes of every tensor by its name in the file."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in (metadata or metadata_of(folder)).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    written = {}
    for name, tensor in (tensors or tensors_of(folder)).items():
        kind = kinds(name, tensor)
        data = stored_form(tensor, kind)
        written[name] = (kind, data)
        raw = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, numpy.ascontiguousarray(data), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written
