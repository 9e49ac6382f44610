"""What a checkpoint's files hold, from their headers alone, and whether that is what the configuration asks for.

The layout is the published one (`DiffusionGemmaForBlockDiffusion.save_pretrained` in transformers): safetensors, one
file or shards with an index; the text weights once, under `model.decoder`; from the encoder only its layer scalars and
the vision tower, which this engine skips; no `lm_head`, which is tied to the token embedding. Tied weights may be
stored more often, and under the other names (tied.py); matrices may be quantized, and experts stored one by one
(stored.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dgemma_ext import arguments
from dgemma_ext.checkpoint.config import LayerConfig, ModelConfig
from dgemma_ext.checkpoint.folder import find_weight_files
from dgemma_ext.checkpoint.gguf_file import SUFFIX as GGUF_SUFFIX
from dgemma_ext.checkpoint.gguf_folder import read_index
from dgemma_ext.checkpoint.headers import read_header
from dgemma_ext.checkpoint.stored import Stored, TensorInfo, find_weight, names_of
from dgemma_ext.checkpoint.tied import sort_names
from dgemma_ext.errors import CheckpointError

_VISION_PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_SELF_CONDITIONING = "model.decoder.self_conditioning."
_ENCODER_SCALAR = "model.encoder.language_model.layers.{}.layer_scalar"


@dataclass(frozen=True)
class CheckpointInfo:
    """The headers of a checkpoint. Tensor names are in file order; `weights` says how each weight that the model needs
    is stored, by its name in `expected_tensors`. `copies` (a copy's name → the name of the tensor that it must equal)
    and `buffers` are stored without need."""

    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    weights: dict[str, Stored]
    copies: dict[str, str]
    buffers: tuple[str, ...]

    @property
    def is_gguf(self) -> bool:
        """Whether the tensors are of a GGUF file, and dequantized where they are read."""
        return self.files[0].suffix == GGUF_SUFFIX

    @property
    def vision_tensors(self) -> tuple[str, ...]:
        """The vision tower and its projector, which are skipped."""
        return tuple(name for name in self.tensors if name.startswith(_VISION_PREFIXES))

    @property
    def total_bytes(self) -> int:
        """Payload of all tensors, without headers."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def vision_bytes(self) -> int:
        return sum(self.tensors[name].nbytes for name in self.vision_tensors)

    @property
    def loaded_bytes(self) -> int:
        """Payload of the tensors that `load_weights` reads; copies are compared with what they copy."""
        return self.total_bytes - self.vision_bytes - sum(self.tensors[name].nbytes for name in self.buffers)


Layout = dict[str, tuple[str, tuple[int, ...]]]


def model_layout(config: ModelConfig) -> Layout:
    """Attribute of ModelWeights → stored name and shape."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    return {
        "embed_tokens": ("model.decoder.embed_tokens.weight", (config.vocab_size, hidden)),
        "norm": ("model.decoder.norm.weight", (hidden,)),
        "self_conditioning_pre_norm": (f"{_SELF_CONDITIONING}pre_norm.weight", (hidden,)),
        "self_conditioning_gate_proj": (f"{_SELF_CONDITIONING}gate_proj.weight", (intermediate, hidden)),
        "self_conditioning_up_proj": (f"{_SELF_CONDITIONING}up_proj.weight", (intermediate, hidden)),
        "self_conditioning_down_proj": (f"{_SELF_CONDITIONING}down_proj.weight", (hidden, intermediate)),
    }


def layer_layout(config: ModelConfig, layer: LayerConfig) -> Layout:
    """Attribute of LayerWeights → stored name and shape. A layer whose values come from its keys has no v_proj."""
    hidden, intermediate, expert = config.hidden_size, config.intermediate_size, config.moe_intermediate_size
    experts = config.num_experts
    queries = config.num_attention_heads * layer.head_dim
    keys = layer.num_key_value_heads * layer.head_dim
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm_1",
        "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm_2",
        "post_feedforward_layernorm",
    )
    suffixes: Layout = {
        **{norm: (f"{norm}.weight", (hidden,)) for norm in norms},
        "q_proj": ("self_attn.q_proj.weight", (queries, hidden)),
        "k_proj": ("self_attn.k_proj.weight", (keys, hidden)),
        "v_proj": ("self_attn.v_proj.weight", (keys, hidden)),
        "o_proj": ("self_attn.o_proj.weight", (hidden, queries)),
        "q_norm": ("self_attn.q_norm.weight", (layer.head_dim,)),
        "k_norm": ("self_attn.k_norm.weight", (layer.head_dim,)),
        "gate_proj": ("mlp.gate_proj.weight", (intermediate, hidden)),
        "up_proj": ("mlp.up_proj.weight", (intermediate, hidden)),
        "down_proj": ("mlp.down_proj.weight", (hidden, intermediate)),
        "router_proj": ("router.proj.weight", (experts, hidden)),
        "router_scale": ("router.scale", (hidden,)),
        "router_per_expert_scale": ("router.per_expert_scale", (experts,)),
        "experts_gate_up": ("experts.gate_up_proj", (experts, 2 * expert, hidden)),
        "experts_down": ("experts.down_proj", (experts, hidden, expert)),
        "decoder_layer_scalar": ("layer_scalar", (1,)),
    }
    if layer.k_eq_v:
        del suffixes["v_proj"]
    prefix = f"model.decoder.layers.{layer.index}."
    layout = {attribute: (prefix + suffix, shape) for attribute, (suffix, shape) in suffixes.items()}
    layout["encoder_layer_scalar"] = (_ENCODER_SCALAR.format(layer.index), (1,))
    return layout


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Stored name → shape of every tensor that `load_weights` reads."""
    layouts = [model_layout(config), *(layer_layout(config, layer) for layer in config.layers)]
    return {name: shape for layout in layouts for name, shape in layout.values()}


@dataclass(frozen=True)
class _StoredTensors:
    """`listing` is the file that says what there is."""

    listing: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]


def _stored_tensors(folder: Path) -> _StoredTensors:
    """What an unpacked GGUF file has, or the headers of safetensors."""
    unpacked = read_index(folder)
    if unpacked is not None:
        file = next(iter(unpacked.values())).file
        return _StoredTensors(file, (file,), unpacked)
    found = find_weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in found.files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"is stored in {tensors[name].file.name} too", file=file, tensor=name)
            if found.index is not None and found.index.get(name) != file.name:
                place = f"in {found.index[name]}" if name in found.index else "nowhere"
                raise CheckpointError(f"{found.listing.name} has it {place}", file=file, tensor=name)
            tensors[name] = info
    for name, file_name in (found.index or {}).items():
        if name not in tensors:
            raise CheckpointError(f"is not in {file_name}, where the index has it", file=found.listing, tensor=name)
    return _StoredTensors(found.listing, tuple(found.files), tensors)


def inspect_checkpoint(path: str | os.PathLike[str], config: ModelConfig) -> CheckpointInfo:
    """Reads the headers alone and compares them with what `config` asks for.

    Raises CheckpointError, naming file and tensor, for a file or tensor that is missing, extra, stored twice under one
    name, misshapen or of a dtype that cannot be loaded, and for a header that is corrupt or does not fit its file's
    size.
    """
    found = _stored_tensors(Path(arguments.path("path", path)))
    tensors = found.tensors
    names = sort_names(tensors)
    weights: dict[str, Stored] = {}
    missing = []
    for name, shape in expected_tensors(config).items():
        stored = find_weight(name, shape, names.weights)
        if stored is None:
            missing.append(name)
        else:
            weights[name] = stored
    known = {name for stored in weights.values() for name in names_of(stored)} | names.copies.keys()
    for name, info in tensors.items():
        if name not in known and name not in names.buffers and not name.startswith(_VISION_PREFIXES):
            raise CheckpointError("is not part of the model that config.json describes", file=info.file, tensor=name)
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"is missing{others}", file=found.listing, tensor=missing[0])
    return CheckpointInfo(found.files, tensors, weights, names.copies, names.buffers)
