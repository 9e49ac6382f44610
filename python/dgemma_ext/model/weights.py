"""The weights of a model, loaded from a checkpoint as stored or quantized while loading."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgemma_ext.checkpoint import (
    CheckpointInfo,
    DeviceReader,
    Layout,
    LoadProgress,
    MappedFiles,
    Merge,
    ModelConfig,
    Stored,
    Target,
    Weight,
    WeightReader,
    check_copies,
    inspect_checkpoint,
    layer_layout,
    model_layout,
    names_of,
    quantized_already,
    stack_weights,
    weight_reader,
)
from dgemma_ext.ops.formats import QuantizedWeight

# The operators that read these take unquantized weights only.
NEVER_QUANTIZED = ("embed_tokens", "router_proj")


@dataclass
class LayerWeights:
    """One layer. Matrices are [out, in]; experts have a leading expert dimension, gate rows before up rows.

    The two weights of the experts are both tensors or both quantized.
    """

    input_layernorm: torch.Tensor
    post_attention_layernorm: torch.Tensor
    pre_feedforward_layernorm: torch.Tensor
    post_feedforward_layernorm_1: torch.Tensor
    pre_feedforward_layernorm_2: torch.Tensor
    post_feedforward_layernorm_2: torch.Tensor
    post_feedforward_layernorm: torch.Tensor
    q_proj: Weight
    k_proj: Weight
    v_proj: Weight | None
    o_proj: Weight
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    gate_proj: Weight
    up_proj: Weight
    down_proj: Weight
    router_proj: torch.Tensor
    router_scale: torch.Tensor
    router_per_expert_scale: torch.Tensor
    experts_gate_up: Weight
    experts_down: Weight
    decoder_layer_scalar: float
    encoder_layer_scalar: float


@dataclass
class ModelWeights:
    """All weights of the text model. `embed_tokens` [vocabulary, hidden] is also the head."""

    embed_tokens: torch.Tensor
    norm: torch.Tensor
    self_conditioning_pre_norm: torch.Tensor
    self_conditioning_gate_proj: Weight
    self_conditioning_up_proj: Weight
    self_conditioning_down_proj: Weight
    layers: list[LayerWeights]


def load_weights(
    path: str | os.PathLike[str],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: bool | None = None,
    weights: Target | str = "auto",
    info: CheckpointInfo | None = None,
    merge: Merge | None = None,
) -> ModelWeights:
    """Loads every text weight to `device`, one at a time, in the order of the files.

    `weights`: "auto" keeps quantized matrices as stored and converts everything else to `dtype`; "unquantized" converts
    all to `dtype`; a Target quantizes the unquantized matrices that it names.

    On the CPU a tensor that is stored in `dtype` stays in the mapped file: nothing is copied, and pages are shared
    between processes and can be dropped by the system. So a checkpoint must not be overwritten while it is in use. (The
    format aligns tensors to one element only, which costs the CPU's matrix products nothing measurable.) Everything
    else is copied in pieces, without a second copy of a tensor; to a GPU through pinned memory, and checked there.

    `progress`: None shows a bar on stderr when that is a terminal and the load takes more than a second. `info`: the
    result of inspect_checkpoint, where the caller has it. `merge`: an adapter that is added to unquantized weights
    before a Target quantizes them.
    Raises CheckpointError as `inspect_checkpoint` does, for NaN and infinite values, converted to `dtype`, for a global
    scale of zero, and for a copy of a tied weight that differs from it; ValueError where a Target meets a matrix that
    is stored in another format, and an adapter one that is stored quantized.
    """
    info = info or inspect_checkpoint(path, config)
    layouts = [(None, model_layout(config)), *((layer.index, layer_layout(config, layer)) for layer in config.layers)]
    place_of = {name: (layer, attribute) for layer, layout in layouts for attribute, (name, _) in layout.items()}
    loaded: dict[str, Weight] = {}
    with (
        LoadProgress("loading weights", info.loaded_bytes, progress) as bar,
        MappedFiles(info) as files,
        weight_reader(files, dtype, torch.device(device), bar.advance) as reader,
    ):
        order = {file: number for number, file in enumerate(info.files)}

        def place(name: str) -> tuple[int, int]:
            first = info.tensors[next(names_of(info.weights[name]))]
            return order[first.file], first.offset

        for name in sorted(info.weights, key=place):
            loaded[name] = _load_weight(*place_of[name], info.weights[name], reader, dtype, weights, merge)
        check_copies(info.tensors, info.copies, bar.advance)

    def weights_of(layout: Layout) -> dict[str, Any]:
        return {attribute: loaded[name] for attribute, (name, _) in layout.items()}

    layers = []
    for layer in config.layers:
        values = {"v_proj": None, **weights_of(layer_layout(config, layer))}
        for scalar in ("decoder_layer_scalar", "encoder_layer_scalar"):
            values[scalar] = values[scalar].item()
        experts = [values["experts_gate_up"], values["experts_down"]]
        if any(isinstance(weight, Tensor) for weight in experts):
            # One kernel reads both, so both have the same format.
            values["experts_gate_up"], values["experts_down"] = (_dequantized(weight, dtype) for weight in experts)
        layers.append(LayerWeights(**values))
    return ModelWeights(**weights_of(model_layout(config)), layers=layers)


def _load_weight(
    layer: int | None,
    attribute: str,
    stored: Stored,
    reader: WeightReader | DeviceReader,
    dtype: torch.dtype,
    weights: Target | str,
    merge: Merge | None,
) -> Weight:
    read = reader.read(stored)
    if merge is not None and merge.factors(layer, attribute) is not None:
        if not isinstance(read, Tensor):
            raise quantized_already(next(names_of(stored)), read.name)
        read = merge.added(layer, attribute, read)
    if attribute in NEVER_QUANTIZED or weights == "unquantized":
        return _dequantized(read, dtype)
    if not isinstance(weights, Target) or not weights.wants(attribute):
        return read
    if isinstance(read, QuantizedWeight):
        if read.name != weights.format:
            name = next(names_of(stored))
            raise ValueError(f"weights {weights.format} was asked for, and the checkpoint has {name} as {read.name}")
        return read
    return quantized_weight(attribute, read, weights)


def _dequantized(weight: Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    if len(weight.shape) < 3:
        return weight.dequantized(dtype)
    # Expert by expert, because the intermediate values are several times as large as the result.
    stack = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for expert in range(weight.shape[0]):
        stack[expert] = weight.expert(expert).dequantized(dtype)
    return stack


def quantized_weight(attribute: str, weight: Tensor, target: Target) -> Weight:
    """Quantizes a matrix, or a stack of experts one by one; returns it as it is where no group divides its columns."""
    if target.group_for(weight.shape[-1]) is None:
        return weight
    if weight.dim() < 3:
        return target.quantize([weight])[0].weight
    matrices = 2 if attribute == "experts_gate_up" else 1
    made = (target.quantize(list(expert.chunk(matrices))) for expert in weight)
    return stack_weights(([one.weight for one in of_expert] for of_expert in made), len(weight))
