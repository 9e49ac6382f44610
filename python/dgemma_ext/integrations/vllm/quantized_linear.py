"""Dense layers of a quantized checkpoint on a CPU, where vLLM has no kernel for them: NVFP4, and INT4 in float32.

vLLM multiplies FP8 and INT8 on any CPU, and INT4 in 16 bits; those stay its own. A scheme of ours stands in place of
vLLM's, under vLLM's own method of linear layers, whose loader names and shards the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)
from vllm.platforms import current_platform

import dgemma_ext._C  # noqa: F401  registers the operator
from dgemma_ext.integrations.vllm.stored_experts import Part, Scheme, fault_of, is_unloaded, keep
from dgemma_ext.ops.formats import FORMATS, Nvfp4Weight


def lacks_a_kernel(scheme: Scheme, dtype: torch.dtype) -> bool:
    """Whether vLLM has no kernel for dense layers of such weights here."""
    return bool(current_platform.is_cpu()) and (
        scheme.format == "nvfp4" or (scheme.format == "int4" and dtype == torch.float32)
    )


class DGemmaLinearScheme(CompressedTensorsScheme):  # type: ignore[misc]
    """A matrix of several projections, quantized by groups of columns, multiplied as it lies."""

    def __init__(self, scheme: Scheme, layer_name: str | None) -> None:
        self.scheme, self.layer_name = scheme, layer_name
        self._loaded: dict[str, set[tuple[Any, ...]]] = {}  # projections by suffix
        self._operands: dict[str, Tensor] = {}

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    def create_weights(
        self,
        layer: Any,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any],
        **others: Any,
    ) -> None:
        """Raises ValueError, naming the layer, where columns that share a scale lie across ranks."""
        rows, columns, group = sum(output_partition_sizes), input_size_per_partition, self.scheme.groups[0]
        if columns % group:
            raise ValueError(
                f"{self.layer_name}: a rank has {columns} columns of it, and {group} of them share a scale; another "
                "--tensor-parallel-size keeps them together"
            )
        layer.logical_widths = output_partition_sizes
        stored = Stored(
            output_partition_sizes, output_size // rows, getattr(layer, "num_kv_head_replicas", 1), input_size
        )
        for part in self.scheme.parts(group):
            places: dict[str, int] = {}
            shape: tuple[int, ...] = (0,)
            if part.role == "unread":
                kind = BasevLLMParameter
            elif part.columns is None:
                kind, shape = PerTensorScaleParameter, (len(output_partition_sizes),)
            else:
                kind = ModelWeightParameter if part.role == "values" else GroupQuantScaleParameter
                shape, places = (rows, columns // part.columns), {"input_dim": 1, "output_dim": 0}
            loader = _unread if part.role == "unread" else self._checked(weight_loader, part, stored)
            layer.register_parameter(part.suffix, kind(data=part.unloaded(shape), weight_loader=loader, **places))

    def _checked(self, load: Callable[..., Any], part: Part, stored: Stored) -> Callable[..., Any]:
        """vLLM's loader behind a check of the dtype, which it would convert, and of the shape: it would leave out rows
        that are too many."""
        loaded = self._loaded.setdefault(part.suffix, set())

        def loader(param: Any, loaded_weight: Tensor, *shard: Any) -> None:
            if loaded_weight.dtype not in part.dtypes or (loaded and loaded_weight.dtype != param.dtype):
                raise ValueError(
                    f"{self.layer_name}: its {part.suffix} is {loaded_weight.dtype}, and wants {param.dtype}"
                )
            shapes = part.shapes(stored.rows(shard), stored.columns)
            if tuple(loaded_weight.shape) not in shapes:
                of = f" ({shard[0]})" if shard else ""
                raise ValueError(
                    f"{self.layer_name}: its {part.suffix}{of} is {list(loaded_weight.shape)}; the configuration asks "
                    f"for {' or '.join(str(list(shape)) for shape in shapes)}"
                )
            if part.keeps_dtype and loaded_weight.dtype != param.dtype:
                param.data = param.data.to(loaded_weight.dtype)
            load(param, loaded_weight, *shard)
            loaded.add(shard)

        return loader

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises ValueError, naming the layer, for what the checkpoint lacks and for values that no weight may have."""
        if not any(self._loaded.values()) and is_unloaded(layer.weight_scale.data):
            raise ValueError(f"{self.layer_name}: the checkpoint has no quantized weight of it")
        for suffix, projections in self._loaded.items():
            whole = () in projections  # stored as one matrix
            if any(self._loaded.values()) and not whole and len(projections) < len(layer.logical_widths):
                raise ValueError(f"{self.layer_name}: a {suffix} of it is missing in the checkpoint")
        for projections in self._loaded.values():
            projections.clear()
        parts = [part for part in self.scheme.parts(self.scheme.groups[0]) if part.role != "unread"]
        tensors = {part.role: getattr(layer, part.suffix).data for part in parts}
        if self.scheme.format == "nvfp4":
            # Projections of different sizes, each with a scale of its own: one for each equal run of rows.
            run = math.gcd(*layer.logical_widths)
            runs = torch.tensor([width // run for width in layer.logical_widths], device=tensors["values"].device)
            tensors["global_scales"] = tensors["global_scales"].repeat_interleave(runs)
            weight: Any = Nvfp4Weight(
                tensors["values"],
                tensors["scales"].view(torch.uint8),
                tensors["global_scales"],
                divides=not self.scheme.modelopt,
            )
        else:
            weight = self.scheme.weight(tensors, 1)
        fault = fault_of(weight)
        if fault is not None:
            raise ValueError(f"{self.layer_name} has {fault}")
        operands = {"values": weight.values, "scales": weight.kernel_scales, "row_scales": weight.kernel_row_scales}
        made = {name: tensor for name, tensor in operands.items() if tensor is not None}
        if self._operands:  # weights that are loaded anew, while vLLM runs
            keep(self._operands, made)
        else:
            self._operands = made
        for name in operands:
            layer.register_buffer(f"dgemma_{name}", self._operands.get(name), persistent=False)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `ops.quantized_gemm.dense`, by the operator itself: vLLM compiles the layers around it in one graph, into
        which a weight that is an object does not go."""
        rows, number = x.reshape(-1, x.shape[-1]), FORMATS[self.scheme.format].number
        product = torch.ops.dgemma.dense_quantized.default(
            rows, number, layer.dgemma_values, layer.dgemma_scales, layer.dgemma_row_scales
        )
        out: Tensor = product.view(*x.shape[:-1], product.shape[-1])
        return out if bias is None else out + bias


@dataclass(frozen=True)
class Stored:
    """The matrices that a layer's parameters are shards of.

    widths: rows of each projection on a rank. ranks: that share the rows. replicas: ranks that have the same rows of
    keys and values. columns: of all ranks.
    """

    widths: list[int]
    ranks: int
    replicas: int
    columns: int

    def rows(self, shard: tuple[Any, ...]) -> int:
        """The rows of a stored matrix, by what vLLM tells a loader of it: which projection, if it is not all of
        them."""
        if not shard or shard[0] is None:
            return sum(self.widths) * self.ranks
        index = "qkv".index(shard[0]) if isinstance(shard[0], str) else shard[0]
        return self.widths[index] * self.ranks // (self.replicas if shard[0] in ("k", "v") else 1)


def _unread(param: Any, loaded_weight: Tensor, *shard: Any) -> None:
    """The loader of a part that nothing reads, such as scales of activations."""
