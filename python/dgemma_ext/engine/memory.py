"""How many bytes a model takes on its device, computed before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dgemma_ext.checkpoint import (
    PARTS,
    Adapter,
    CheckpointInfo,
    Experts,
    Matrix,
    ModelConfig,
    Stored,
    Target,
    layer_layout,
    model_layout,
    names_of,
)
from dgemma_ext.checkpoint.vision_config import SOFT_TOKENS, VisionConfig, vision_tensors
from dgemma_ext.engine.cuda_graphs import CAPTURE_STREAMS, capture_pool, operators_can_be_captured
from dgemma_ext.engine.gpu_memory import cublas_workspace_bytes, free_bytes, unused_in_pools
from dgemma_ext.engine.pass_memory import DenseMatrix, PassMemory
from dgemma_ext.engine.training_memory import TrainingSizes, backward_bytes
from dgemma_ext.model import (
    ENCODE_CHUNK,
    MAX_PREFILL_TOKENS,
    NEVER_QUANTIZED,
    Cache,
    MatmulMode,
    Network,
    check_activations,
)
from dgemma_ext.model.vision import KEPT_FEATURES, tower_workspace_bytes
from dgemma_ext.ops.formats import FORMATS, QuantizedWeight
from dgemma_ext.sampling import make_canvas_batch, make_step_buffers
from dgemma_ext.units import format_bytes

# Positions of a cache slot unless a caller names them; the model's context where that is shorter.
USUAL_CONTEXT = 8192


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. `weights`: part of the model → (its format or dtype, bytes).

    On a GPU also `graphs`, the memory of captured steps, and `cublas`, the workspaces that torch gives cuBLAS for
    `streams` streams. `prefix_cache`: the budget for copies of slots from which requests and chats continue.
    `adapters`: the factors of those that are loaded with the model. Of training: `trained`, factors with gradients and
    moments, and `backward`, what the passes keep for it.
    """

    weights: dict[str, tuple[str, int]]
    cache: int
    workspace: int
    logits: int
    context: int
    requests: int = 1
    graphs: int = 0
    cublas: int = 0
    streams: int = 0
    prefix_cache: int = 0
    adapters: int = 0
    trained: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        weights = self.adapters + sum(nbytes for _, nbytes in self.weights.values())
        passes = self.cache + self.workspace + self.logits + self.graphs + self.cublas + self.prefix_cache
        return weights + passes + self.trained + self.backward

    def rows(self) -> list[tuple[str, str, int]]:
        """The lines of the table: purpose, format, bytes; the total last."""
        adapters = [("adapters", "factors of both passes", self.adapters)] if self.adapters else []
        not_everywhere = [
            ("graphs", "largest captured step", self.graphs),
            ("cuBLAS", f"workspaces of {_several(self.streams, 'stream')}", self.cublas),
            ("prefix cache", "copies of slots", self.prefix_cache),
            ("trained", "with gradients and moments", self.trained),
            ("backward", "what a step keeps for it", self.backward),
        ]
        return [
            *((f"{part} weights", format, nbytes) for part, (format, nbytes) in self.weights.items()),
            *adapters,
            ("cache", f"{_several(self.requests, 'slot')} of {self.context:,} tokens", self.cache),
            ("workspace", "largest of a pass", self.workspace),
            ("logits", f"of {_several(self.requests, 'canvas')}", self.logits),
            *(row for row in not_everywhere if row[-1]),
            ("total", "", self.total),
        ]

    def table(self) -> str:
        return "\n".join(plan_row(*row) for row in self.rows())


def plan_row(purpose: str, format: str, nbytes: int) -> str:
    """A line of the plan's table."""
    return f"{purpose:18}  {format:24}  {format_bytes(nbytes):>8}"


def _several(count: int, what: str) -> str:
    return f"one {what}" if count == 1 else f"{count} {what}es" if what == "canvas" else f"{count} {what}s"


class NotEnoughMemory(MemoryError):
    """The device cannot hold a model, or a batch of requests.

    `plan` is what it would take, `available` the device's free bytes.
    """

    def __init__(self, plan: MemoryPlan, available: int, device: torch.device) -> None:
        self.plan = plan
        self.available = available
        self.device = device
        what = "the model" if plan.weights else f"a batch of {plan.requests}" if plan.requests else "an adapter"
        super().__init__(
            f"{device} has {format_bytes(available)} free, and {what} takes {format_bytes(plan.total)}:\n{plan.table()}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.plan, self.available, self.device)


def memory_plan(
    config: ModelConfig,
    info: CheckpointInfo,
    weights: Target | str,
    dtype: torch.dtype,
    device: torch.device,
    context: int | None = None,
    activations: str | None = None,
    prefix_cache_bytes: int = 0,
    vision: VisionConfig | None = None,
    adapters: Collection[Adapter] = (),
    training: TrainingSizes | None = None,
) -> MemoryPlan:
    """The memory that loading `info` with these options takes, with one request of `context` positions.

    weights, dtype: as in load_weights; activations: "fp8" where the experts' inputs are rounded to it; vision: of the
    tower that is loaded too; adapters: that are loaded too; training: of a step of training. On the CPU, weights that
    stay in their mapped file count as well. Raises ValueError for a context that the model does not have, and for
    activations that do not match the format of the experts' weights.
    """
    chosen = min(USUAL_CONTEXT, config.max_position_embeddings) if context is None else context
    cache = Cache(config, slots=1, max_length=chosen, dtype=dtype, device=torch.device("meta"))
    bytes_of_parts = _weights(config, info, weights, dtype)
    if vision is not None:
        tensors = vision_tensors(vision, config.hidden_size).values()
        bytes_of_parts["vision"] = (str(dtype).removeprefix("torch."), sum(map(math.prod, tensors)) * dtype.itemsize)
    experts = bytes_of_parts["experts"][0]
    check_activations(activations, experts)
    positions = _positions(1, config.canvas_length, chosen)
    dense = _dense_matrices(config, info, weights, dtype)
    passes = PassMemory(config, dtype, device, experts.split(", "), dense, activations)
    captured = device.type == "cuda" and operators_can_be_captured()
    return MemoryPlan(
        weights=bytes_of_parts,
        cache=cache.nbytes,
        workspace=max(passes.workspace(positions), _of_images(vision, config, dtype)),
        logits=config.canvas_length * config.vocab_size * dtype.itemsize,
        context=chosen,
        graphs=passes.step(config.canvas_length) if captured else 0,
        prefix_cache=prefix_cache_bytes,
        adapters=sum(adapter_bytes(adapter, dtype, device) for adapter in adapters),
        trained=0 if training is None else training.trained_bytes,
        backward=0 if training is None else backward_bytes(training, config, dtype, experts),
        **_cublas(device, captured),
    )


def check_adapter_memory(network: Network, adapter: Adapter) -> None:
    """Raises NotEnoughMemory where the device has no room for an adapter beside the model."""
    plan = MemoryPlan({}, 0, 0, 0, 0, 0, adapters=adapter_bytes(adapter, network.dtype, network.device))
    check_memory(plan, 0, network.device)


def adapter_bytes(adapter: Adapter, dtype: torch.dtype, device: torch.device) -> int:
    """What an adapter takes: its factors, and on a GPU those of the denoise pass once more, in the table that a step
    reads (model/adapter_table.py)."""
    again = 0 if device.type == "cpu" else sum(factors.numel for factors in adapter.decoder.values())
    return (adapter.parameters + again) * dtype.itemsize


def batch_plan(
    network: Network,
    requests: int,
    length: int,
    max_length: int,
    slots: int,
    captured: bool = False,
    prefix_cache_bytes: int = 0,
    vision: VisionConfig | None = None,
) -> MemoryPlan:
    """The memory that a batch takes beside the model: buffers for `requests` canvases of `length` tokens, and a cache
    of `slots` for `max_length` positions each (0 slots where the cache exists already).

    captured: whether its steps are captured in CUDA graphs. prefix_cache_bytes: its budget. vision: of the model's
    tower.
    """
    config, dtype, device = network.config, network.dtype, network.device
    batch = make_canvas_batch(network, requests, length, device="meta")
    buffers = make_step_buffers(network, requests, length, device="meta")
    slot = Cache(config, 1, max_length, dtype, torch.device("meta")).nbytes
    positions = _positions(requests, length, max_length)
    experts = [weight for layer in network.weights.layers for weight in (layer.experts_gate_up, layer.experts_down)]
    formats = {weight.name if isinstance(weight, QuantizedWeight) else "unquantized" for weight in experts}
    passes = PassMemory(config, dtype, device, formats, _dense_of(network), network.options.activations)
    return MemoryPlan(
        weights={},
        cache=slots * slot,
        workspace=max(passes.workspace(positions), _of_images(vision, config, dtype))
        + batch.nbytes
        + buffers.nbytes
        - buffers.logits.nbytes,
        logits=buffers.logits.nbytes,
        context=max_length,
        requests=requests,
        graphs=passes.step(requests * length) if captured else 0,
        prefix_cache=prefix_cache_bytes,
        **_cublas(device, captured),
    )


def _of_images(vision: VisionConfig | None, config: ModelConfig, dtype: torch.dtype) -> int:
    """What the tower takes for the largest image, beside the features that are kept."""
    if vision is None:
        return 0
    most = max(SOFT_TOKENS)
    return tower_workspace_bytes(vision, dtype, most) + KEPT_FEATURES * most * config.hidden_size * dtype.itemsize


def _cublas(device: torch.device, captured: bool) -> dict[str, int]:
    """Workspaces of cuBLAS: for the stream of the caller, and for those in which steps are tried and captured."""
    if device.type != "cuda":
        return {}
    streams = 1 + (CAPTURE_STREAMS if captured else 0)
    return {"streams": streams, "cublas": streams * cublas_workspace_bytes(device)}


def check_memory(plan: MemoryPlan, mapped: int, device: torch.device) -> None:
    """Raises NotEnoughMemory where the device has fewer bytes free than the plan takes without its `mapped` bytes and
    without what earlier captures hold for later ones."""
    available = available_bytes(device)
    if available is not None and plan.total - mapped - _held_for(plan, device) > available:
        raise NotEnoughMemory(plan, available, device)


def _held_for(plan: MemoryPlan, device: torch.device) -> int:
    """The bytes of a plan's graphs and workspaces that torch holds already: all graphs of a GPU share them."""
    pool = capture_pool(device) if plan.graphs else None
    return 0 if pool is None else plan.cublas + min(plan.graphs, unused_in_pools(device).get(pool, 0))


def available_bytes(device: torch.device) -> int | None:
    """The free bytes of a GPU, or of main memory as the operating system reports them; None where it does not."""
    if device.type == "cuda":
        return free_bytes(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def mapped_bytes(
    config: ModelConfig,
    info: CheckpointInfo,
    weights: Target | str,
    dtype: torch.dtype,
    vision: VisionConfig | None = None,
    changed: Collection[str] = (),
) -> int:
    """Bytes of the weights that stay in their mapped file on the CPU: unquantized, and stored in `dtype`. changed:
    attributes of weights that an adapter is added to."""
    stored_as = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    of_tower = info.vision_tensors if vision is not None else ()
    total = sum(info.tensors[name].nbytes for name in of_tower if info.tensors[name].dtype == stored_as)
    for attribute, stored in _by_attribute(config, info):
        is_changed = attribute in changed or (isinstance(weights, Target) and weights.wants(attribute))
        if stored.kind == "unquantized" and not isinstance(stored, Experts) and not is_changed:
            tensor = info.tensors[next(names_of(stored))]
            total += tensor.nbytes if tensor.dtype == stored_as else 0
    return total


def _by_attribute(config: ModelConfig, info: CheckpointInfo) -> list[tuple[str, Stored]]:
    """Every weight with its attribute of ModelWeights or LayerWeights."""
    layouts = [model_layout(config), *(layer_layout(config, layer) for layer in config.layers)]
    return [(attribute, info.weights[name]) for layout in layouts for attribute, (name, _) in layout.items()]


def _weights(
    config: ModelConfig, info: CheckpointInfo, weights: Target | str, dtype: torch.dtype
) -> dict[str, tuple[str, int]]:
    """Part of the model → (formats, bytes), in the order of the table."""
    parts: dict[str, dict[str, int]] = {}
    for attribute, stored in _by_attribute(config, info):
        part = next((part for part, attributes in PARTS.items() if attribute in attributes), "other")
        part = "embedding" if attribute == "embed_tokens" else part
        format, nbytes = _bytes_of(attribute, stored, weights, dtype)
        bytes_by_format = parts.setdefault(part, {})
        bytes_by_format[format] = bytes_by_format.get(format, 0) + nbytes
    order = ("embedding", "experts", "attention", "mlp", "other")
    return {part: (", ".join(parts[part]), sum(parts[part].values())) for part in order if part in parts}


def _dense_matrices(
    config: ModelConfig, info: CheckpointInfo, weights: Target | str, dtype: torch.dtype
) -> set[DenseMatrix]:
    """The dense weights whose products are our own: quantized ones."""
    found: set[DenseMatrix] = set()
    for attribute, stored in _by_attribute(config, info):
        format, _ = _bytes_of(attribute, stored, weights, dtype)
        if format in FORMATS and len(stored.shape) == 2:
            found.add((format, *stored.shape))
    return found


def _dense_of(network: Network) -> set[DenseMatrix]:
    """The same of a model that is loaded, with all dense weights where its options make every product our own."""
    found: set[DenseMatrix] = set()
    is_own = network.options.matmul is MatmulMode.INVARIANT
    for values in map(vars, (network.weights, *network.weights.layers)):
        for attribute, weight in values.items():
            if isinstance(weight, QuantizedWeight) and len(weight.shape) == 2:
                found.add((weight.name, *weight.shape))
            elif is_own and attribute.endswith("_proj") and isinstance(weight, torch.Tensor):
                found.add((None, *weight.shape))
    return found


def _bytes_of(attribute: str, stored: Stored, weights: Target | str, dtype: torch.dtype) -> tuple[str, int]:
    """The format or dtype that a weight has on the device, and its bytes."""
    values = math.prod(stored.shape)
    columns = stored.shape[-1] if stored.shape else 1
    kind, group = stored.kind, _group(stored)
    if isinstance(weights, Target) and kind == "unquantized" and weights.wants(attribute):
        wanted = weights.group_for(columns)
        if wanted is not None:
            kind, group = weights.format, wanted
    if kind in ("unquantized", "mixed") or weights == "unquantized" or attribute in NEVER_QUANTIZED:
        return str(dtype).removeprefix("torch."), values * dtype.itemsize
    kept = FORMATS[kind.removesuffix("-modelopt")]
    return kept.name, kept.nbytes(values, columns, group)


def _group(stored: Stored) -> int:
    if isinstance(stored, Experts):
        return stored.matrices[0][0].group
    return stored.group if isinstance(stored, Matrix) else 0


def _positions(requests: int, length: int, max_length: int) -> int:
    """The largest number of rows in a pass: a chunk of a prompt, or canvases with the tokens that their first step
    encodes."""
    return max(min(ENCODE_CHUNK, max_length), requests * length + min(MAX_PREFILL_TOKENS, max_length))
