"""The weights of a model: loading them from a checkpoint, as they are stored or quantized on the way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgemma_ext.checkpoint import (
    CheckpointInfo,
    Layout,
    LoadProgress,
    MappedFiles,
    ModelConfig,
    Stored,
    Target,
    TensorInfo,
    Weight,
    WeightReader,
    expected_tensors,
    inspect_checkpoint,
    layer_layout,
    model_layout,
    names_of,
    resolve_checkpoint,
    stack_weights,
)
from dgemma_ext.ops.formats import QuantizedWeight

__all__ = [
    "CheckpointInfo",
    "LayerWeights",
    "ModelWeights",
    "TensorInfo",
    "expected_tensors",
    "inspect_checkpoint",
    "load_weights",
    "resolve_checkpoint",
]

# Read by operators that take plain weights alone.
_ALWAYS_PLAIN = ("embed_tokens", "router_proj")


@dataclass
class LayerWeights:
    """One layer. Matrices are [out, in]; experts have a leading expert dimension, gate rows before up rows.
    A Weight is a tensor or a quantized weight; both of the experts' are the one or the other."""

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
    weights: Target | str = "stored",
    info: CheckpointInfo | None = None,
) -> ModelWeights:
    """Loads every text weight on `device`, one at a time, in the order of the files.

    `weights`: "stored" keeps quantized matrices as they are, and everything else comes as `dtype`; "plain" brings all
    to `dtype`; a Target quantizes the plain matrices that it wants.

    On the CPU a tensor that is stored as it is wanted is the mapped file itself: nothing is copied, pages are shared
    between processes and can be dropped by the system. The format aligns tensors to no more than an element, which
    costs the CPU's matrix products nothing measurable. So a checkpoint must not be overwritten while it is in use.
    Everything else is copied, through the mapping, in pieces; no second copy of a tensor exists.

    `progress`: None shows a bar on stderr when that is a terminal and the load takes more than a second. `info`: what
    inspect_checkpoint returned, where the caller has it.
    Raises CheckpointError as `inspect_checkpoint` does, and for NaN and infinite values, converted to `dtype`, and for
    scales of zero; ValueError where a Target meets a matrix that is stored in another format.
    """
    info = info or inspect_checkpoint(path, config)
    layouts = [model_layout(config), *(layer_layout(config, layer) for layer in config.layers)]
    attribute_of = {name: attribute for layout in layouts for attribute, (name, _) in layout.items()}
    loaded: dict[str, Weight] = {}
    with (
        LoadProgress("loading weights", info.loaded_bytes, progress) as bar,
        MappedFiles(info) as files,
    ):
        reader = WeightReader(files, dtype, torch.device(device), bar.advance)
        order = {file: number for number, file in enumerate(info.files)}

        def place(name: str) -> tuple[int, int]:
            first = info.tensors[next(names_of(info.weights[name]))]
            return order[first.file], first.offset

        for name in sorted(info.weights, key=place):
            loaded[name] = _as_wanted(attribute_of[name], info.weights[name], reader, dtype, weights)

    def weights_of(layout: Layout) -> dict[str, Any]:
        return {attribute: loaded[name] for attribute, (name, _) in layout.items()}

    layers = []
    for layer in config.layers:
        of_layer = {"v_proj": None, **weights_of(layer_layout(config, layer))}
        for scalar in ("decoder_layer_scalar", "encoder_layer_scalar"):
            of_layer[scalar] = of_layer[scalar].item()
        experts = [of_layer["experts_gate_up"], of_layer["experts_down"]]
        if any(isinstance(weight, Tensor) for weight in experts):
            # One kernel takes both.
            of_layer["experts_gate_up"], of_layer["experts_down"] = (_plain(weight, dtype) for weight in experts)
        layers.append(LayerWeights(**of_layer))
    return ModelWeights(**weights_of(model_layout(config)), layers=layers)


def _as_wanted(
    attribute: str, stored: Stored, reader: WeightReader, dtype: torch.dtype, weights: Target | str
) -> Weight:
    read = reader.read(stored)
    if attribute in _ALWAYS_PLAIN or weights == "plain":
        return _plain(read, dtype)
    if not isinstance(weights, Target) or not weights.wants(attribute):
        return read
    if isinstance(read, QuantizedWeight):
        if read.name != weights.format:
            name = next(names_of(stored))
            raise ValueError(f"weights {weights.format} was asked for, and the checkpoint has {name} as {read.name}")
        return read
    return quantized_weight(attribute, read, weights)


def _plain(weight: Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    if len(weight.shape) < 3:
        return weight.dequantized(dtype)
    # Expert by expert: what stands between is several times as large as the result.
    stack = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for expert in range(weight.shape[0]):
        stack[expert] = weight.expert(expert).dequantized(dtype)
    return stack


def quantized_weight(attribute: str, weight: Tensor, target: Target) -> Weight:
    """The matrix in the wanted format, expert by expert; plain where no group of columns divides its rows."""
    if target.group_for(weight.shape[-1]) is None:
        return weight
    if weight.dim() < 3:
        return target.quantize([weight])[0]
    matrices = 2 if attribute == "experts_gate_up" else 1
    return stack_weights((target.quantize(list(expert.chunk(matrices))) for expert in weight), len(weight))
