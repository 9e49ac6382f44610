"""Writes a checkpoint's quantized form, in the layout of compressed-tensors: `dgemma quantize`.

Shards are written one by one to the folder OUT.partial, matrix by matrix (shard_writer.py). It gets its index and its
config.json last and is then renamed: a folder OUT is always complete. A run that was interrupted or killed is continued
by the next one with the same source and format; what it finished is not made again. Memory is bounded by one matrix, or
a copied tensor, which stays mapped.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma_ext.checkpoint.adapter_merge import Merge, MergedFiles
from dgemma_ext.checkpoint.config import ModelConfig
from dgemma_ext.checkpoint.files import CheckpointInfo, inspect_checkpoint, layer_layout
from dgemma_ext.checkpoint.folder import INDEX_FILE
from dgemma_ext.checkpoint.json_section import read_object
from dgemma_ext.checkpoint.partial_folder import State, check_destination, locked, write_json, writing
from dgemma_ext.checkpoint.quantization import PARTS, Target
from dgemma_ext.checkpoint.reading import MappedFiles
from dgemma_ext.checkpoint.shard_writer import ShardWriter
from dgemma_ext.checkpoint.stored import Experts, Stored, names_of
from dgemma_ext.checkpoint.tied import check_copies, published_name
from dgemma_ext.ops.formats import FORMATS, Fp8Weight, Int4Weight, Int8Weight, Nvfp4Weight, QuantizedWeight

# The approximate size of a shard.
_SHARD_BYTES = 1_500_000_000
# The files of a checkpoint that are copied beside its weights.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*")
_LAYOUTS = {
    "fp8": "float-quantized",
    "int8": "int-quantized",
    "int4": "pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
_IGNORED = ["lm_head", "re:.*embed_tokens.*", "re:.*router.*", "re:.*self_conditioning.*", "re:.*vision.*"]


# Mean squares of the inputs of quantized matrices, by layer and attribute of LayerWeights: [columns], and of experts
# [experts, columns] (model/calibration.py).
Moments = Mapping[tuple[int, str], Tensor]


@dataclass
class PartError:
    """The quantization error of one part of one layer.

    `error` and `size` are the sums of the squared differences and of the squared original values, `before` what `error`
    would be with the scales of the largest magnitudes. With second moments each square is multiplied by its column's.
    """

    layer: int
    part: str
    error: float = 0.0
    size: float = 0.0
    before: float = 0.0

    @property
    def relative(self) -> float:
        """||quantized - original|| / ||original||."""
        return self._relative(self.error)

    @property
    def relative_before(self) -> float:
        return self._relative(self.before)

    def add(self, other: PartError) -> None:
        self.error += other.error
        self.size += other.size
        self.before += other.before

    def _relative(self, error: float) -> float:
        return (error / self.size) ** 0.5 if self.size else 0.0


@dataclass(frozen=True)
class Work:
    """One weight to write: `attribute` of LayerWeights where it is quantized, None where it is copied."""

    names: tuple[str, ...]
    layer: int
    attribute: str | None
    stored: Stored | None
    out_bytes: int


@dataclass
class Conversion:
    """A source and how it is written. `shards`: the weights of each file. `groups`: columns that share a scale → the
    attributes that are quantized so."""

    info: CheckpointInfo
    target: Target
    shards: list[list[Work]]
    groups: dict[int, list[str]] = field(default_factory=dict)
    moments: Moments | None = None
    merge: Merge | None = None


def plan_conversion(
    source: Path, target: Target, moments: Moments | None = None, merge: Merge | None = None
) -> Conversion:
    """Plans from the headers alone which weights are quantized and which shard each goes to.

    Raises CheckpointError for a source that cannot be loaded, ValueError for one with a weight that is quantized
    already: the section of config.json that is written tells of one format alone.
    """
    config = ModelConfig.from_file(source)
    info = inspect_checkpoint(source, config)
    wanted = {
        name: (layer.index, attribute)
        for layer in config.layers
        for attribute, (name, _) in layer_layout(config, layer).items()
        if target.wants(attribute)
    }
    conversion = Conversion(info, target, [[]], moments=moments, merge=merge)
    # Copies of tied weights and buffers are not written.
    taken = {*info.copies, *info.buffers}
    works = []
    for stored in info.weights.values():
        if stored.kind != "unquantized":
            raise ValueError(f"IN: the checkpoint has {next(names_of(stored))} as {stored.kind}; wants it unquantized")
    for name, (layer_index, attribute) in wanted.items():
        stored = info.weights[name]
        columns = stored.shape[-1]
        group = target.group_for(columns)
        if group is None:
            continue
        conversion.groups.setdefault(group, []).append(attribute)
        names = tuple(names_of(stored))
        taken |= set(names)
        values = math.prod(stored.shape)
        works.append(Work(names, layer_index, attribute, stored, values * FORMATS[target.format].bits // 8))
    works += [
        Work((name,), -1, None, None, tensor.nbytes) for name, tensor in info.tensors.items() if name not in taken
    ]
    # Weights are sorted by their place in the source, so that it is read once from front to back.
    files = {file: number for number, file in enumerate(info.files)}
    works.sort(key=lambda work: (files[info.tensors[work.names[0]].file], info.tensors[work.names[0]].offset))
    size = 0
    for work in works:
        if size and size + work.out_bytes > _SHARD_BYTES:
            conversion.shards.append([])
            size = 0
        conversion.shards[-1].append(work)
        size += work.out_bytes
    return conversion


def convert(
    source: Path,
    destination: Path,
    target: Target,
    advance: Callable[[int], None] = lambda nbytes: None,
    moments: Moments | None = None,
    merge: Merge | None = None,
) -> list[PartError]:
    """Writes `source` as `target` to `destination`, which must not exist; returns the error of each layer's parts.

    advance: called with the number of the source's bytes that were converted since the last call. moments: by which
    errors are weighed where scales are searched; None weighs all alike. merge: an adapter that is added to the weights
    first.
    Raises CheckpointError and ValueError as plan_conversion does, ValueError for a destination that exists, and for a
    partial one that another run writes or that is of another source or format; CheckpointError when a file cannot be
    written (what is finished is kept for the next run).
    """
    check_destination(destination)
    conversion = plan_conversion(source, target, moments, merge)
    partial = destination.with_name(destination.name + ".partial")
    with locked(partial):
        check_destination(destination)  # which another run may have finished meanwhile
        state = State.open(partial, _fingerprint(source, conversion))
        _write_shards(source, partial, conversion, state, advance)
        with writing(partial):
            _write_companions(source, partial, conversion)
            write_json(partial / INDEX_FILE, state.index(partial, len(conversion.shards)))
        state.rename(partial, destination)
    return _summed([PartError(**error) for error in state.errors()])


def _write_shards(
    source: Path, partial: Path, conversion: Conversion, state: State, advance: Callable[[int], None]
) -> None:
    """Writes the shards that are not finished."""
    config = ModelConfig.from_file(source)
    check_copies(conversion.info.tensors, conversion.info.copies)
    advance(sum(conversion.info.tensors[name].nbytes for name in (*conversion.info.copies, *conversion.info.buffers)))
    count = len(conversion.shards)
    for number, works in enumerate(conversion.shards):
        file = partial / f"model-{number + 1:05}-of-{count:05}.safetensors"
        if str(number) in state.done:
            advance(sum(conversion.info.tensors[name].nbytes for work in works for name in work.names))
        else:
            with writing(file), _files_of(conversion, config) as reader, ShardWriter(file) as shard:
                _write_shard(works, reader, conversion, shard, advance)
                names = shard.finish()
                errors = [PartError(**note) for note in shard.notes if note is not None]
            state.finish(number, names, [vars(error) for error in _summed(errors)])
        ShardWriter.remove_pieces(file)


def _files_of(conversion: Conversion, config: ModelConfig) -> MappedFiles:
    info, merge = conversion.info, conversion.merge
    return MappedFiles(info) if merge is None else MergedFiles(info, config, merge)


def _write_shard(
    works: list[Work], source: MappedFiles, conversion: Conversion, shard: ShardWriter, advance: Callable[[int], None]
) -> None:
    """Writes the weights of a shard in units: a copied tensor, or matrices that are quantized together. Those that the
    shard has from an earlier run are not made again."""
    finished = len(shard.notes)
    number = 0
    for work in works:
        left = sum(source.info.tensors[name].nbytes for name in work.names)
        for unit in _units(work, source, conversion.moments):
            if number >= finished:
                _write_unit(work, unit, source, conversion.target, shard)
            number += 1
            done = min(left, sum(value.nbytes for value in unit.values))
            advance(done)
            left -= done
        advance(left)


@dataclass(frozen=True)
class Unit:
    """At most some seconds' work: the published name and the values of a tensor to copy, or the names without their
    suffix of matrices that are quantized together, with the second moments of their input. Values are mapped, not read.
    """

    names: list[str]
    values: list[Tensor]
    importance: Tensor | None = None


def _write_unit(work: Work, unit: Unit, source: MappedFiles, target: Target, shard: ShardWriter) -> None:
    """Copies a tensor, or quantizes matrices and notes their error."""
    _check_finite(work, source, unit.values)
    if work.attribute is None:
        tensors = dict(zip(unit.names, unit.values, strict=True))
        if source.info.is_gguf:  # whose values are of other types, and were bfloat16
            shard.write({name: values.to(torch.bfloat16) for name, values in tensors.items()}, None)
        else:
            shard.write(tensors, None, source.info.tensors[work.names[0]].dtype)
        return
    part = next(part for part, attributes in PARTS.items() if work.attribute in attributes)
    error = PartError(work.layer, part)
    tensors = {}
    for base, made in zip(unit.names, target.quantize(unit.values, unit.importance), strict=True):
        tensors |= {f"{base}.{suffix}": tensor for suffix, tensor in stored_parts(made.weight).items()}
        error.add(PartError(work.layer, part, made.error, made.size, made.before))
    shard.write(tensors, vars(error))


def _check_finite(work: Work, source: MappedFiles, values: list[Tensor]) -> None:
    for value in values:
        # A finite sum has finite terms, but finite terms may have an infinite sum.
        if not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):
            raise source.error(work.names[0], "has values that are not finite")


def _units(work: Work, source: MappedFiles, moments: Moments | None) -> Iterator[Unit]:
    """A weight in units."""
    if work.attribute is None:
        yield Unit([published_name(work.names[0])], [source.tensor(work.names[0])])
        return
    found = None if moments is None else moments[work.layer, work.attribute]

    def importance(expert: int) -> Tensor | None:
        return None if found is None else found[expert]

    if isinstance(work.stored, Experts):
        for expert, matrices in enumerate(work.stored.matrices):
            names = [matrix.parts["values"] for matrix in matrices]
            bases = [published_name(name).removesuffix(".weight") for name in names]
            yield Unit(bases, [source.tensor(name) for name in names], importance(expert))
        return
    name, tensor = published_name(work.names[0]), source.tensor(work.names[0])
    if tensor.dim() == 2:
        yield Unit([name.removesuffix(".weight")], [tensor], found)
        return
    folder = name.rpartition(".")[0]
    projections = ["gate_proj", "up_proj"] if work.attribute == "experts_gate_up" else ["down_proj"]
    for expert, stacked in enumerate(tensor):
        bases = [f"{folder}.{expert}.{each}" for each in projections]
        yield Unit(bases, list(stacked.chunk(len(projections))), importance(expert))


def stored_parts(weight: QuantizedWeight) -> dict[str, Tensor]:
    """A quantized matrix as compressed-tensors stores it, by the suffix of its name."""
    if isinstance(weight, Fp8Weight):
        return {
            "weight": weight.values.view(torch.float8_e4m3fn),
            "weight_scale": weight.scales[:, None].to(torch.bfloat16),
        }
    if isinstance(weight, Int8Weight):
        return {"weight": weight.values.view(torch.int8), "weight_scale": weight.scales[:, None].to(torch.bfloat16)}
    if isinstance(weight, Int4Weight):
        return {
            "weight_packed": weight.values.view(torch.int32),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor(weight.shape, device="cpu"),
        }
    assert isinstance(weight, Nvfp4Weight)
    return {
        "weight_packed": weight.values,
        "weight_scale": weight.scales.view(torch.float8_e4m3fn),
        "weight_global_scale": weight.global_scales.clone(),
    }


def quantization_config(conversion: Conversion) -> dict[str, Any]:
    """The section for config.json: one group of modules for each number of columns that share a scale."""
    target = conversion.target
    groups = {}
    for number, (group, attributes) in enumerate(sorted(conversion.groups.items())):
        weights: dict[str, Any] = {"num_bits": FORMATS[target.format].bits, "symmetric": True, "dynamic": False}
        activations = None
        match target.format:
            case "fp8":
                weights |= {"type": "float", "strategy": "channel"}
                activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
            case "int8":
                weights |= {"type": "int", "strategy": "channel"}
                activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
            case "int4":
                weights |= {"type": "int", "strategy": "group", "group_size": group}
            case "nvfp4":
                weights |= {"type": "float", "strategy": "tensor_group", "group_size": group}
                weights["scale_dtype"] = "torch.float8_e4m3fn"
            case _:
                raise KeyError(target.format)
        groups[f"group_{number}"] = {
            "targets": [_module_pattern(attribute) for attribute in sorted(set(attributes))],
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
            "format": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": _LAYOUTS[target.format],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _IGNORED,
        "kv_cache_scheme": None,
    }


def _module_pattern(attribute: str) -> str:
    """The modules of an attribute of LayerWeights, as a regular expression of compressed-tensors."""
    if attribute == "experts_gate_up":
        return r"re:.*\.experts\.\d+\.(gate|up)_proj$"
    if attribute == "experts_down":
        return r"re:.*\.experts\.\d+\.down_proj$"
    module = "self_attn" if attribute in PARTS["attention"] else "mlp"
    return rf"re:.*\.{module}\.{attribute}$"


def _summed(errors: list[PartError]) -> list[PartError]:
    """The errors of each part of a layer added up, in order."""
    sums: dict[tuple[int, str], PartError] = {}
    for error in errors:
        sums.setdefault((error.layer, error.part), PartError(error.layer, error.part)).add(error)
    return [sums[key] for key in sorted(sums)]


def _fingerprint(source: Path, conversion: Conversion) -> str:
    """A hash of the source's files (names, sizes, times), of the target, the second moments and the adapter."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in conversion.info.files]
    text = json.dumps([str(source.resolve()), files, repr(conversion.target), _SHARD_BYTES])
    hashed = hashlib.sha256(text.encode())
    for key, moments in sorted((conversion.moments or {}).items()):
        hashed.update(repr(key).encode() + moments.numpy().tobytes())
    if conversion.merge is not None:
        hashed.update(conversion.merge.digest.encode())
    return hashed.hexdigest()


def _write_companions(source: Path, partial: Path, conversion: Conversion) -> None:
    """Copies tokenizer, templates and configurations, and writes config.json with its quantization section."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.name not in (INDEX_FILE, "config.json"):
                shutil.copyfile(file, partial / file.name)
    config = read_object(source / "config.json")
    config["quantization_config"] = quantization_config(conversion)
    write_json(partial / "config.json", config)
