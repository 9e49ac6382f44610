"""Records the operators of a pass, the part of the step that each belongs to, and its time on the host.

While a Recorder is active, torch hands it every operator call (TorchDispatchMode), so the model needs no code for it
and pays nothing otherwise. An operator's part follows from the weights among its arguments. An operator without
weights, such as a sum or a conversion, belongs to the part of the operator that made its newest argument.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dgemma_ext._C as _C
from dgemma_ext import environment
from dgemma_ext.model import ModelWeights
from dgemma_ext.ops.plain.vocabulary_head import vocabulary_head
from dgemma_ext.profile.count import weights_by_layer
from dgemma_ext.profile.parts import PART_OF_OPERATOR, Part, part_of_weight
from dgemma_ext.profile.soft_tiles import READ_BY_SOFT_TILES

# The name of a profiler's range for a call of a Recorder, before the call's number (kernels.py reads it).
RANGE = "dgemma call "
_PRODUCTS = ("mm", "addmm", "matmul", "dense", "dense_quantized")
_ATTENTION = ("canvas_attention", "causal_attention", "append_to_cache")


@dataclass(frozen=True)
class Call:
    """One operator call. `name` is as in count.Operation, `begin` and `end` are of time.perf_counter, and `repeat` is
    the number of the pass."""

    part: Part
    name: str
    layer: int | None
    begin: float
    end: float
    repeat: int


@dataclass(frozen=True)
class _Owner:
    attribute: str
    layer: int | None


class Recorder(TorchDispatchMode):
    """Records the operators inside `with recorder:` into `calls`, in their order.

    `routed`: layer → the expert ids of its feed-forward calls. ranges: also opens a range of torch's profiler for every
    call, by which kernels.py finds its kernels.
    """

    def __init__(self, weights: ModelWeights, sliding: Sequence[bool], ranges: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.routed: dict[int, list[Tensor]] = {}
        self._sliding = sliding
        self._ranges = ranges
        self._owners: dict[int, _Owner] = {}
        for layer, attributes in weights_by_layer(weights):
            for attribute, weight in attributes.items():
                tensors = [weight] if isinstance(weight, Tensor) else list(weight.tensors().values())
                self._owners |= {tensor.data_ptr(): _Owner(attribute, layer) for tensor in tensors}
        # The arguments by name, and the result, of each soft embedding.
        self.soft_embeddings: list[tuple[dict[str, Any], Tensor]] = []
        # Address of a result → number and part of the call that made it. A later result at the address replaces it.
        self._made: dict[int, tuple[int, Part]] = {}
        self._repeat = -1
        self._layer: int | None = None
        # Whether the pass is between the lookup of the tokens and the first layer.
        self._in_input = False

    def begin_pass(self) -> None:
        """Begins a pass. Earlier results are forgotten, because unrecorded passes may have used their addresses."""
        self._repeat += 1
        self._made.clear()
        self._layer, self._in_input = None, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        short = func._schema.name.partition("::")[2]
        if short == "vocabulary_head" and not statistics_in_head(args[0].device):
            # Without a kernel the head is a torch product and an operator for the statistics: records them apart.
            with self:
                return vocabulary_head(*args, **kwargs)
        part, name = self._part_and_name(short.removeprefix("batched_"), args)
        if name == "moe_ffn" and self._layer is not None:
            self.routed.setdefault(self._layer, []).append(args[1])
        if func.is_view or short == "_unsafe_view":
            result = func(*args, **kwargs)
        else:
            result = self._timed(func, args, kwargs, part, name)
        if short == "soft_embedding":
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            self.soft_embeddings.append(_soft_embedding_of(named, named.get("out", result)))
        number = len(self.calls)
        for tensor in _tensors(result if isinstance(result, tuple | list) else (result,)):
            if tensor.data_ptr() not in self._owners:
                self._made[tensor.data_ptr()] = (number, part)
        return result

    def _timed(self, func: Any, args: Any, kwargs: Any, part: Part, name: str) -> Any:
        if not self._ranges:
            return self._called(func, args, kwargs, part, name)
        with torch.profiler.record_function(f"{RANGE}{len(self.calls)}"):
            return self._called(func, args, kwargs, part, name)

    def _called(self, func: Any, args: Any, kwargs: Any, part: Part, name: str) -> Any:
        layer = self._layer
        begin = time.perf_counter()
        result = func(*args, **kwargs)
        self.calls.append(Call(part, name, layer, begin, time.perf_counter(), self._repeat))
        return result

    def _part_and_name(self, short: str, args: Any) -> tuple[Part, str]:
        """The part of a call and its name in count.Operation. Also tracks the layer that the pass is in."""
        tensors = _tensors(args)
        if short.startswith("new_") or short in ("empty", "zeros", "full"):
            return Part.OTHER, short
        owner = next((self._owners[t.data_ptr()] for t in tensors if t.data_ptr() in self._owners), None)
        if short in PART_OF_OPERATOR:
            self._layer, self._in_input = None, False
            return PART_OF_OPERATOR[short], short
        if short in _ATTENTION:
            sliding = self._layer is not None and self._sliding[self._layer]
            return (Part.SLIDING if sliding else Part.FULL), short
        if owner is None:
            return self._part_by_origin(tensors), short
        self._layer = owner.layer
        self._in_input = short == "embedding" or (self._in_input and part_of_weight(owner.attribute) is Part.EMBEDDING)
        if owner.attribute == "embed_tokens":
            return (Part.EMBEDDING, short) if short == "embedding" else (Part.HEAD, "vocabulary_head")
        name = owner.attribute if short in _PRODUCTS else short.removesuffix("_quantized").removesuffix("_fp8")
        return part_of_weight(owner.attribute), name

    def _part_by_origin(self, tensors: Sequence[Tensor]) -> Part:
        """The part of the call that made the newest of the tensors."""
        made = [self._made[t.data_ptr()] for t in tensors if t.data_ptr() in self._made]
        part = max(made, key=lambda entry: entry[0])[1] if made else Part.OTHER
        if self._in_input:
            # The last step's soft embedding is used here, and an unrecorded step may have made it.
            fresh = bool(made) and part is Part.OTHER
            return Part.OTHER if fresh or not tensors else Part.EMBEDDING
        # Inside the layers nothing belongs to the input any more: this is the first layer's norm.
        return Part.NORMS if part is Part.EMBEDDING else part


def statistics_in_head(device: torch.device) -> bool:
    """Whether the head's kernel computes the statistics as well, as the one on a GPU does."""
    return device.type == "cuda" and _C.has_cuda() and not environment.plain_kernels()


def _tensors(values: Any) -> list[Tensor]:
    """The non-empty tensors among arguments and in their lists, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.numel():
                found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _soft_embedding_of(named: dict[str, Any], result: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The arguments that soft_tiles.py reads, and the result. They are copied on the CPU, where the rows of a batch
    take turns with one set of buffers."""
    read = {name: named[name] for name in READ_BY_SOFT_TILES if name in named}
    if result.is_cpu:
        read = {name: value.clone() if isinstance(value, Tensor) else value for name, value in read.items()}
        result = result.clone()
    return read, result


def experts_hit(routed: Sequence[Tensor]) -> int:
    """The number of experts that the calls route at least one token to; -1 is a slot without an expert."""
    ids = torch.cat([chosen.flatten() for chosen in routed]).unique()
    return int((ids >= 0).sum())
