"""What a checkpoint's files hold, from their headers alone, and whether that is what the configuration asks for.

The layout is the published one (`DiffusionGemmaForBlockDiffusion.save_pretrained` in transformers): safetensors, one
file or shards with an index; the text weights once, under `model.decoder`; from the encoder only its layer scalars and
the vision tower, which this engine skips; no `lm_head`, which is tied to the token embedding. Matrices may be
quantized, and experts stored one by one (stored.py).
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_ext import arguments
from dgemma_ext.checkpoint.bundled import bundled_checkpoint
from dgemma_ext.checkpoint.config import LayerConfig, ModelConfig
from dgemma_ext.checkpoint.stored import FLOAT_DTYPES, Stored, TensorInfo, find_weight, names_of
from dgemma_ext.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_VISION_PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_SELF_CONDITIONING = "model.decoder.self_conditioning."
_ENCODER_SCALAR = "model.encoder.language_model.layers.{}.layer_scalar"

# Bytes per element of every dtype that the safetensors format names (sub-byte ones are not listed).
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
# The largest header that the safetensors library reads.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class CheckpointInfo:
    """The headers of a checkpoint. Tensor names are in file order; `weights` says how each weight that the model needs
    is stored, by its name in `expected_tensors`."""

    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    weights: dict[str, Stored]

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
        """Payload of the tensors that `load_weights` reads."""
        return self.total_bytes - self.vision_bytes


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


def inspect_checkpoint(path: str | os.PathLike[str], config: ModelConfig) -> CheckpointInfo:
    """Reads the headers alone and compares them with what `config` asks for.

    Raises CheckpointError, naming file and tensor, for a file or tensor that is missing, extra, stored twice, misshapen
    or of a dtype that cannot be loaded, and for a header that is corrupt or does not fit its file's size.
    """
    listing, files, index = _list_files(Path(path))
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"is stored in {tensors[name].file.name} too", file=file, tensor=name)
            if index is not None and index.get(name) != file.name:
                place = f"in {index[name]}" if name in index else "nowhere"
                raise CheckpointError(f"{listing.name} has it {place}", file=file, tensor=name)
            tensors[name] = info
    for name, file_name in (index or {}).items():
        if name not in tensors:
            raise CheckpointError(f"is not in {file_name}, where the index has it", file=listing, tensor=name)

    expected = expected_tensors(config)
    weights: dict[str, Stored] = {}
    missing = []
    for name, shape in expected.items():
        stored = find_weight(name, shape, tensors)
        if stored is None:
            missing.append(name)
        else:
            weights[name] = stored
    known = {name for stored in weights.values() for name in names_of(stored)}
    for name, info in tensors.items():
        if name not in known and not name.startswith(_VISION_PREFIXES):
            raise CheckpointError("is not part of the model that config.json describes", file=info.file, tensor=name)
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"is missing{others}", file=listing, tensor=missing[0])
    return CheckpointInfo(files=tuple(files), tensors=tensors, weights=weights)


def _list_files(folder: Path) -> tuple[Path, list[Path], dict[str, str] | None]:
    """The file that lists the tensors, the files that hold them, and the index where there is one.

    A single model.safetensors is taken before an index, as transformers does.
    """
    if not folder.is_dir():
        raise CheckpointError("is not a folder", file=folder)
    single, index_file = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return single, [single], None
    if not index_file.is_file():
        raise CheckpointError(f"has neither {SINGLE_FILE} nor {INDEX_FILE}", file=folder)
    try:
        document = json.loads(index_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read as JSON: {error}", file=index_file) from error
    index = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(index, dict) or not index or any(not isinstance(name, str) for name in index.values()):
        raise CheckpointError("has no weight_map of tensor names to file names", file=index_file)
    for tensor, name in index.items():
        # A plain file name: an index must not reach outside its folder.
        if Path(name).name != name:
            raise CheckpointError(
                f"is said to be in {name!r}, which is not a file name", file=index_file, tensor=tensor
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"is said to be in {name}, which is missing", file=index_file, tensor=tensor)
    return index_file, [folder / name for name in sorted(set(index.values()))], index


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """One file's tensors in the order of their bytes.

    The format: eight bytes of little-endian header length, that many bytes of JSON, then the tensors without gaps.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"is cut short or corrupt: a header of {length} bytes in {size}", file=file)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=file) from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise CheckpointError(f"has a corrupt header: {error}", file=file) from error
    if not isinstance(header, dict):
        raise CheckpointError("has a corrupt header: not an object", file=file)
    header.pop("__metadata__", None)

    payload = size - 8 - length
    entries = sorted(
        ((name, *_read_entry(file, name, entry)) for name, entry in header.items()), key=lambda entry: entry[3:]
    )
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for name, dtype, shape, begin, tensor_end in entries:
        if begin != end:
            raise CheckpointError(f"begins at byte {begin}, the one before it ends at {end}", file=file, tensor=name)
        end = tensor_end
        if end > payload:
            raise CheckpointError(f"is cut short: it ends at byte {end} of {payload}", file=file, tensor=name)
        tensors[name] = TensorInfo(file, dtype, shape, nbytes=end - begin, offset=8 + length + begin)
    if end != payload:
        raise CheckpointError(f"has {payload - end} bytes after its last tensor", file=file)
    return tensors


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is listed twice")
    return result


def _read_entry(file: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """A header entry as dtype, shape, begin and end, checked against each other."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError("has a corrupt header entry", file=file, tensor=name)
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(f"has dtype {dtype}; supported: {', '.join(FLOAT_DTYPES)}", file=file, tensor=name)
    begin, end = offsets
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise CheckpointError(f"has {end - begin} bytes; {dtype} {shape} takes another number", file=file, tensor=name)
    return dtype, tuple(shape), begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


# The hub's form: owner/name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]


def resolve_checkpoint(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: itself, that of a bundled model by its name (bundled.py; `./demo` is a folder of that
    name), or a hub id (`owner/name`) downloaded, or found in the hub's cache.

    Raises ValueError for what is no path, CheckpointError for a path that is not there, and, for a hub id, when
    huggingface_hub is not installed or the download fails.
    """
    path = Path(arguments.path("path_or_hub_id", path_or_hub_id))
    name = str(path) if isinstance(path_or_hub_id, bytes) else os.fspath(path_or_hub_id)
    if (bundled := bundled_checkpoint(name)) is not None:
        return bundled
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError("is a file; wanted: the checkpoint's folder, or a hub id (owner/name)", file=name)
    if not isinstance(path_or_hub_id, str) or not _HUB_ID.fullmatch(name):
        raise CheckpointError("does not exist; wanted: the checkpoint's folder, or a hub id (owner/name)", file=name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            "is no folder here, and downloading it as a hub id needs huggingface_hub (pip install huggingface_hub); "
            "or fetch the repository's files yourself and give their folder",
            file=name,
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises its own, requests' and the operating system's errors
        raise CheckpointError(
            f"is no folder here, and downloading it as a hub id failed: {error}", file=name
        ) from error
