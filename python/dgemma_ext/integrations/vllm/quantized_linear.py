"""Dense layers of a quantized checkpoint on a CPU, where vLLM has no kernel for them: NVFP4, and INT4 in float32.

vLLM multiplies FP8 and INT8 on any CPU, and INT4 in 16 bits; those stay its own. A scheme of ours stands in place of
vLLM's, under vLLM's own method of linear layers, whose loader names and shards the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
from dgemma_ext.integrations.vllm.stored_experts import Scheme, fault_of
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

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    def create_weights(
        self,
        layer: Any,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
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
            data = torch.empty(shape, dtype=part.dtypes[0] if part.dtypes else torch.float32)
            loader = _unread if part.role == "unread" else self._checked(weight_loader, part)
            layer.register_parameter(part.suffix, kind(data=data, weight_loader=loader, **places))

    def _checked(self, load: Callable[..., Any], part: Any) -> Callable[..., Any]:
        """vLLM's loader, which checks shapes itself, behind a check of the dtype, which it would convert."""
        loaded = self._loaded.setdefault(part.suffix, set())

        def loader(param: Any, loaded_weight: Tensor, *shard: Any) -> None:
            if loaded_weight.dtype not in part.dtypes or (loaded and loaded_weight.dtype != param.dtype):
                raise ValueError(
                    f"{self.layer_name}: its {part.suffix} is {loaded_weight.dtype}, and wants {param.dtype}"
                )
            if part.keeps_dtype and loaded_weight.dtype != param.dtype:
                param.data = param.data.to(loaded_weight.dtype)
            load(param, loaded_weight, *shard)
            loaded.add(shard)

        return loader

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises ValueError, naming the layer, for what the checkpoint lacks and for values that no weight may have."""
        for suffix, projections in self._loaded.items():
            if any(self._loaded.values()) and len(projections) < len(layer.logical_widths):
                raise ValueError(f"{self.layer_name}: a {suffix} of it is missing in the checkpoint")
        parts = [part for part in self.scheme.parts(self.scheme.groups[0]) if part.role != "unread"]
        tensors = {part.role: getattr(layer, part.suffix).data for part in parts}
        if self.scheme.format == "nvfp4":
            # Projections of different sizes, each with a scale of its own: one for each equal run of rows.
            run = math.gcd(*layer.logical_widths)
            runs = torch.tensor([width // run for width in layer.logical_widths], device=tensors["values"].device)
            tensors["global_scales"] = tensors["global_scales"].repeat_interleave(runs)
            weight: Any = Nvfp4Weight(
                tensors["values"], tensors["scales"].view(torch.uint8), tensors["global_scales"], divides=True
            )
        else:
            weight = self.scheme.weight(tensors, 1)
        fault = fault_of(weight)
        if fault is not None:
            raise ValueError(f"{self.layer_name} has {fault}")
        operands = {"values": weight.values, "scales": weight.kernel_scales, "row_scales": weight.kernel_row_scales}
        for name, tensor in operands.items():
            layer.register_buffer(f"dgemma_{name}", tensor, persistent=False)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `ops.quantized_gemm.dense`, by the operator itself: vLLM compiles the layers around it in one graph, into
        which a weight that is an object does not go."""
        rows, number = x.reshape(-1, x.shape[-1]), FORMATS[self.scheme.format].number
        product = torch.ops.dgemma.dense_quantized.default(
            rows, number, layer.dgemma_values, layer.dgemma_scales, layer.dgemma_row_scales
        )
        out: Tensor = product.view(*x.shape[:-1], product.shape[-1])
        return out if bias is None else out + bias


def _unread(param: Any, loaded_weight: Tensor, *shard: Any) -> None:
    """The loader of a part that nothing reads, such as scales of activations."""
