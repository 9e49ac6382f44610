"""Which operators a pass runs, of which part of the step each is, and how long the host was in each.

Nothing of the model knows of this: while a Recorder is active, torch hands it every operator that is called
(TorchDispatchMode), and an operator's part follows from the weights among its arguments. What has none, a sum or a
conversion, belongs to the part of the operator that made its newest argument. Outside of a Recorder nothing is paid.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dgemma_ext import _C
from dgemma_ext.model import ModelWeights
from dgemma_ext.ops import vocabulary_head
from dgemma_ext.profile.count import weights_by_layer
from dgemma_ext.profile.parts import PART_OF_OPERATOR, PART_OF_WEIGHT, Part

# How the ranges of a profiler's trace are called that stand for the calls of a Recorder (kernels.py reads them).
RANGE = "dgemma call "
_PRODUCTS = ("mm", "addmm", "matmul", "dense", "dense_quantized")
_ATTENTION = ("canvas_attention", "causal_attention", "append_to_cache")
# Arguments of the soft embedding that `soft_tiles` reads.
_READ_BY_SOFT_TILES = (
    *("active", "row_max", "row_sum", "tile_max", "tile_sum"),
    *("embedding_scale", "tolerance", "max_embedding_norm"),
)


@dataclass(frozen=True)
class Call:
    """One operator call: `name` as in count.Operation, seconds on the clock of time.perf_counter; of which pass."""

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
    """Records the operators of what runs inside `with recorder:`, into `calls` in their order.

    `routed`: layer → the expert ids of its feed-forward calls. ranges: also names a range of torch's profiler for every
    call, which is how kernels on a GPU find theirs.
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
                kept = [weight] if isinstance(weight, Tensor) else list(weight.tensors().values())
                self._owners |= {tensor.data_ptr(): _Owner(attribute, layer) for tensor in kept}
        # Arguments by name, and the result, of the soft embeddings.
        self.softened: list[tuple[dict[str, Any], Tensor]] = []
        # Address of a result → number of the call and part that made it. An address that is used anew is made anew.
        self._made: dict[int, tuple[int, Part]] = {}
        self._repeat = -1
        self._layer: int | None = None
        # Between the lookup of the tokens and the first layer.
        self._in_input = False

    def begin_pass(self) -> None:
        """Counts a pass, and forgets where results lie: what ran unwatched may have put others there."""
        self._repeat += 1
        self._made.clear()
        self._layer, self._in_input = None, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        short = func._schema.name.partition("::")[2]
        if short == "vocabulary_head" and not statistics_in_head(args[0].device):
            # It is written in torch's operators there: the product is the head's, the statistics are not.
            with self:
                return vocabulary_head._plain(*args, **kwargs)
        part, name = self._part_and_name(short, args)
        if name == "moe_ffn" and self._layer is not None:
            self.routed.setdefault(self._layer, []).append(args[1])
        if func.is_view or short == "_unsafe_view":
            result = func(*args, **kwargs)
        else:
            result = self._timed(func, args, kwargs, part, name)
        if short == "soft_embedding":
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            self.softened.append(_soft_embedding_of(named, named.get("out", result)))
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
        """The part of a call and its name in count.Operation; keeps in mind which layer the pass is in."""
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
        self._in_input = short == "embedding" or (self._in_input and PART_OF_WEIGHT[owner.attribute] is Part.EMBEDDING)
        if owner.attribute == "embed_tokens":
            return (Part.EMBEDDING, short) if short == "embedding" else (Part.HEAD, "vocabulary_head")
        name = owner.attribute if short in _PRODUCTS else short.removesuffix("_quantized").removesuffix("_fp8")
        return PART_OF_WEIGHT[owner.attribute], name

    def _part_by_origin(self, tensors: Sequence[Tensor]) -> Part:
        """The part of the call that made the newest of these."""
        made = [self._made[t.data_ptr()] for t in tensors if t.data_ptr() in self._made]
        part = max(made, key=lambda entry: entry[0])[1] if made else Part.OTHER
        if self._in_input:
            # The last step's soft embedding comes in here, perhaps from a step that nobody looked at.
            fresh = bool(made) and part is Part.OTHER
            return Part.OTHER if fresh or not tensors else Part.EMBEDDING
        # A pass that has entered its layers does not go back to its input: this is a layer's first norm.
        return Part.NORMS if part is Part.EMBEDDING else part


def statistics_in_head(device: torch.device) -> bool:
    """Whether a kernel makes the statistics while the head's product is still at hand: a GPU's own does."""
    return device.type == "cuda" and _C.has_cuda() and os.environ.get("DGEMMA_KERNELS") != "plain"


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among arguments, in their order; those in lists too, empty ones not."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.numel():
                found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _soft_embedding_of(named: dict[str, Any], result: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The arguments that `soft_tiles` reads, and the result. On the CPU the rows of a batch take turns with one set of
    buffers, so that they are copied."""
    read = {name: named[name] for name in _READ_BY_SOFT_TILES if name in named}
    if result.is_cpu:
        read = {name: value.clone() if isinstance(value, Tensor) else value for name, value in read.items()}
        result = result.clone()
    return read, result


def soft_tiles(softened: Sequence[tuple[dict[str, Any], Tensor]]) -> tuple[float, float]:
    """Vocabulary tiles that the soft embeddings must not leave out: mean of a row, and of all rows together.

    The rule of ops.denoise.soft_embedding: what is left out has a mass that, times the largest norm of an embedding, is
    within the tolerance times the norm of the row's result. The heaviest tiles are kept.
    """
    of_rows: list[Tensor] = []
    together: Tensor | None = None
    for named, result in softened:
        running = slice(None) if named.get("active") is None else named["active"]
        row_max, row_sum, tile_max, tile_sum = (
            named[name][running] for name in ("row_max", "row_sum", "tile_max", "tile_sum")
        )
        masses = tile_sum.double() * (tile_max - row_max[..., None]).double().exp()
        masses = (masses / row_sum[..., None]).nan_to_num(0.0).flatten(0, -2)
        norms = result[running].double().norm(dim=-1).flatten() / named["embedding_scale"]
        spare = norms * named["tolerance"] / named["max_embedding_norm"]
        ordered, order = masses.sort(dim=-1, descending=True)
        # Mass of a tile and of all that are lighter.
        rest = ordered.flip(-1).cumsum(-1).flip(-1)
        needed = (rest > spare[:, None]) & (ordered > 0)
        of_rows.append(needed.sum(-1).double())
        touched = torch.zeros_like(needed).scatter(-1, order, needed).any(0)
        together = touched if together is None else together | touched
    assert together is not None, "the caller has a soft embedding"
    return float(torch.cat(of_rows).mean()), float(together.sum())


def experts_hit(routed: Sequence[Tensor]) -> int:
    """How many experts at least one token of the calls goes to; -1 is a slot without one."""
    ids = torch.cat([chosen.flatten() for chosen in routed]).unique()
    return int((ids >= 0).sum())
