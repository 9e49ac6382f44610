"""The figures behind `dgemma info`, as JSON types. Sizes are in bytes."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dgemma_ext._C as _C
from dgemma_ext import demo
from dgemma_ext.checkpoint import (
    TOKENIZER_FILE,
    Adapter,
    CheckpointInfo,
    GenerationDefaults,
    LayerConfig,
    ModelConfig,
    Tokenizer,
    expected_tensors,
    ignored_settings,
    inspect_checkpoint,
    read_soft_tokens,
    resolve_weights,
)
from dgemma_ext.engine import USUAL_CONTEXT, USUAL_SNAPSHOTS, memory_plan
from dgemma_ext.errors import CheckpointError
from dgemma_ext.model import Cache, resolve_dtype
from dgemma_ext.model.vision import resolve_images
from dgemma_ext.version import __version__


def machine_facts() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        # The processors that this process may run on.
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_variants": _C.cpu_variants(),
        "cpu_variant": _C.cpu_variant(),
        "cuda_kernels": _C.has_cuda(),
        "gpus": [{"name": gpu.name, "bytes": gpu.total_memory} for gpu in gpus],
        "bundled_sudoku_sizes": sorted(demo.checkpoints()),
    }


def checkpoint_facts(
    folder: Path,
    context: int | None,
    weights: str = "auto",
    dtype: str = "auto",
    device: str = "cpu",
    activations: str | None = None,
    adapter: Adapter | None = None,
) -> dict[str, Any]:
    """The facts of config.json, generation_config.json and the tensor headers, and the memory that the model takes.

    No weight is read. context: positions of the cache slot in the memory plan. weights, dtype, device, activations: as
    in from_pretrained; "cuda" is planned without a GPU too. adapter: that the memory plan counts too. Raises
    CheckpointError, and ValueError as memory_plan does.
    """
    config = ModelConfig.from_file(folder)
    headers = inspect_checkpoint(folder, config)
    loaded = sum(math.prod(shape) for shape in expected_tensors(config).values())
    return {
        "path": str(headers.files[0] if headers.is_gguf else folder),
        "files": len(headers.files),
        "stored": _stored_by_dtype(headers),
        "stored_bytes": headers.total_bytes,
        "loaded_bytes": {"bfloat16": 2 * loaded, "float32": 4 * loaded},
        "sliding_layers": _layers([layer for layer in config.layers if layer.is_sliding]),
        "full_layers": _layers([layer for layer in config.layers if not layer.is_sliding]),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention_heads": config.num_attention_heads,
        "experts": {
            "count": config.num_experts,
            "per_token": config.top_k_experts,
            "size": config.moe_intermediate_size,
        },
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "canvas_length": config.canvas_length,
        "parameters": {"text": loaded, "active": loaded - _resting_parameters(config)},
        "vision": _vision(folder, config, headers),
        "cache": _cache(config, context or min(USUAL_CONTEXT, config.max_position_embeddings)),
        "memory": _memory(config, headers, context, weights, dtype, device, activations, adapter),
        # Stored without need: copies of tied weights, compared when they are loaded, and buffers, not read.
        "copies": sorted(headers.copies),
        "buffers": sorted(headers.buffers),
        "sampler": asdict(GenerationDefaults.from_file(folder, config)),
        "ignored_settings": ignored_settings(folder),
        "text_files": _text_files(folder),
    }


def _vision(folder: Path, config: ModelConfig, headers: CheckpointInfo) -> dict[str, Any]:
    """The vision tower; "refused" says why it cannot be loaded, and is None for one that can."""
    facts: dict[str, Any] = {
        "tensors": len(headers.vision_tensors),
        "bytes": headers.vision_bytes,
        # model.encoder.vision_tower and the like: three parts name the module.
        "prefixes": sorted({".".join(name.split(".")[:3]) for name in headers.vision_tensors}),
        "refused": None,
    }
    try:
        vision = resolve_images("auto", headers, config)
        soft_tokens = read_soft_tokens(folder)
    except CheckpointError as error:
        return {**facts, "refused": str(error)}
    if vision is None:
        return facts
    return {**facts, "layers": vision.num_layers, "hidden_size": vision.hidden_size, "soft_tokens": soft_tokens}


def adapter_facts(adapter: Adapter, config: ModelConfig) -> dict[str, Any]:
    """What an adapter's files say. bytes: of its factors in the checkpoint's dtype."""
    return {
        "base": adapter.settings.base,
        "rank": adapter.rank,
        "scale": adapter.scale,
        "passes": adapter.passes,
        "modules": list(adapter.modules),
        "parameters": adapter.parameters,
        "bytes": adapter.parameters * config.dtype.itemsize,
        "dtype": str(config.dtype).removeprefix("torch."),
        "ignored": list(adapter.ignored),
        "digest": adapter.digest,
    }


def _layers(layers: list[LayerConfig]) -> dict[str, Any]:
    if not layers:
        return {"count": 0, "key_value_heads": 0, "head_dim": 0, "window": 0}
    first = layers[0]
    return {
        "count": len(layers),
        "key_value_heads": first.num_key_value_heads,
        "head_dim": first.head_dim,
        "window": first.sliding_window,
    }


def _stored_by_dtype(headers: CheckpointInfo) -> dict[str, dict[str, int]]:
    stored: dict[str, dict[str, int]] = {}
    for tensor in headers.tensors.values():
        part = stored.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
        part["tensors"] += 1
        part["bytes"] += tensor.nbytes
    return stored


def _resting_parameters(config: ModelConfig) -> int:
    """Parameters of the experts that a token is not routed to: three matrices (gate, up, down) each."""
    resting = config.num_experts - config.top_k_experts
    return len(config.layers) * resting * 3 * config.hidden_size * config.moe_intermediate_size


def _cache(config: ModelConfig, context: int) -> dict[str, Any]:
    def bytes_of(layers: list[LayerConfig]) -> int:
        # Keys and values, two vectors per head.
        return sum(2 * layer.num_key_value_heads * layer.head_dim * config.dtype.itemsize for layer in layers)

    slot = Cache(config, slots=1, max_length=context, dtype=config.dtype, device=torch.device("meta"))
    return {
        "dtype": str(config.dtype).removeprefix("torch."),
        "bytes_per_token": bytes_of(list(config.layers)),
        "bytes_per_token_after_window": bytes_of([layer for layer in config.layers if not layer.is_sliding]),
        "slot_context": context,
        "slot_bytes": slot.nbytes,
    }


def _memory(
    config: ModelConfig,
    headers: CheckpointInfo,
    context: int | None,
    weights: str,
    dtype: str,
    device: str,
    activations: str | None,
    adapter: Adapter | None,
) -> dict[str, Any]:
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    wanted, resolved = resolve_weights(weights), resolve_dtype(dtype, config)
    try:
        vision = resolve_images("auto", headers, config)
    except CheckpointError:  # which the facts of the tower say
        vision = None
    beside = () if adapter is None else (adapter,)
    options = (context, activations)
    plan = memory_plan(config, headers, wanted, resolved, place, *options, vision=vision, adapters=beside)
    return {
        "device": place.type,
        "weights": {part: {"kept": format, "bytes": nbytes} for part, (format, nbytes) in plan.weights.items()},
        "cache_bytes": plan.cache,
        "workspace_bytes": plan.workspace,
        "logits_bytes": plan.logits,
        "graphs_bytes": plan.graphs,
        "cublas_bytes": plan.cublas,
        "adapters_bytes": plan.adapters,
        "chat_snapshots": USUAL_SNAPSHOTS,
        "chat_snapshots_bytes": USUAL_SNAPSHOTS * plan.cache,
        "total_bytes": plan.total,
        "context": plan.context,
        "table": plan.table(),
    }


def _text_files(folder: Path) -> dict[str, bool]:
    has_tokenizer = (folder / TOKENIZER_FILE).is_file()
    has_template = has_tokenizer and Tokenizer.from_directory(folder).chat_template is not None
    return {TOKENIZER_FILE: has_tokenizer, "chat template": has_template}


def _cpu_name() -> str:
    """The CPU's name as Linux reports it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
