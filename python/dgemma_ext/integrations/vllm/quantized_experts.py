"""The experts of a quantized checkpoint: parameters that vLLM loads, multiplied by our grouped GEMM as they lie.

vLLM names, shards and loads the parameters (RoutedExperts.weight_loader); this method gives them the layout of a
QuantizedWeight (stored_experts.py), so that after loading the weights are views of them. What a checkpoint hands in is
checked on the way: vLLM's loader writes a tensor that is too small into a corner, and converts one of another dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, make_unquantized_moe_kernel
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from dgemma_ext.integrations.vllm.experts import experts_class
from dgemma_ext.integrations.vllm.stored_experts import Part, Scheme, first_fault, is_unloaded, keep
from dgemma_ext.ops.formats import QuantizedWeight

# vLLM's names of an expert's projections, and the parameters' prefix of each.
_PREFIX = {"w1": "w13", "w3": "w13", "w2": "w2"}
_PROJECTIONS = {"w13": ("w1", "w3"), "w2": ("w2",)}


class DGemmaQuantizedFusedMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Creates the parameters of a scheme, checks what is loaded into them, and multiplies by them."""

    def __init__(self, moe: Any, scheme: Scheme) -> None:
        super().__init__(moe)
        self.scheme, self.experts_cls = scheme, experts_class()
        self._loaded: set[tuple[str, str, int]] = set()  # parameter, projection, expert of all

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Raises ValueError, naming the layer, for sizes that vLLM has padded."""
        moe, own = self.moe, intermediate_size_per_partition
        wanted, given = [moe.intermediate_size, moe.hidden_dim_unpadded], [own * moe.tp_size, hidden_size]
        if given != wanted:
            raise ValueError(
                f"{layer.layer_name}: vLLM has padded its experts from {wanted} to {given}, and quantized ones have no "
                "padding"
            )
        load = extra_weight_attrs["weight_loader"]
        for prefix, group, rows, columns in (
            ("w13", self.scheme.groups[0], own, hidden_size),
            ("w2", self.scheme.groups[1], hidden_size, own),
        ):
            projections = _PROJECTIONS[prefix]
            # As the checkpoint has the matrix, of which this rank has a shard.
            stored = (rows * moe.tp_size, columns) if prefix == "w13" else (rows, columns * moe.tp_size)
            for part in self.scheme.parts(group):
                shape = part.parameter(num_experts, len(projections), rows, columns)
                parameter = torch.nn.Parameter(part.unloaded(shape), requires_grad=False)
                name = f"{prefix}_{part.suffix}"
                layer.register_parameter(name, parameter)
                loader = _unread if part.role == "unread" else self._checked(load, layer, part, part.shapes(*stored))
                attributes = {**extra_weight_attrs, "weight_loader": loader, "quant_method": part.shared}
                set_weight_attrs(parameter, attributes)

    def _checked(
        self, load: Callable[..., Any], layer: Any, part: Part, shapes: tuple[tuple[int, ...], ...]
    ) -> Callable[..., Any]:
        """vLLM's loader behind a check of dtype and shape, which notes what it has loaded."""

        def loader(
            param: Any,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            if loaded_weight.dtype not in part.dtypes or tuple(loaded_weight.shape) not in shapes:
                wanted = " or ".join(_text(dtype) for dtype in part.dtypes)
                raise ValueError(
                    f"{_stored_name(layer, shard_id, expert_id, part)} is {_text(loaded_weight.dtype)} "
                    f"{list(loaded_weight.shape)}; the configuration asks for {wanted} "
                    f"{' or '.join(str(list(shape)) for shape in shapes)}"
                )
            name = f"{_PREFIX[shard_id]}_{part.suffix}"
            if part.keeps_dtype and loaded_weight.dtype != param.dtype:
                if any(one == name for one, _, _ in self._loaded):
                    raise ValueError(
                        f"{_stored_name(layer, shard_id, expert_id, part)} is {_text(loaded_weight.dtype)}, and that "
                        f"of other experts {_text(param.dtype)}"
                    )
                param.data = param.data.to(loaded_weight.dtype)
            done = load(param, loaded_weight, weight_name, shard_id, expert_id, return_success=True)
            if done:
                self._loaded.add((name, shard_id, expert_id))
            return bool(done) if return_success else None

        return loader

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises ValueError, naming expert and projection, for what the checkpoint lacks and for values that no weight
        may have."""
        self._check_complete(layer)
        weights = []
        for prefix, group in zip(("w13", "w2"), self.scheme.groups, strict=True):
            parts = [part for part in self.scheme.parts(group) if part.role != "unread"]
            tensors = {part.role: getattr(layer, f"{prefix}_{part.suffix}").data for part in parts}
            weight = self.scheme.weight(tensors, len(_PROJECTIONS[prefix]))
            fault = first_fault(weight)
            if fault is not None:
                names = " or ".join(_projection(layer, shard) for shard in _PROJECTIONS[prefix])
                raise ValueError(f"{layer.layer_name}.{self._own(layer)[fault[0]]}.{names} has {fault[1]}")
            weights.append(weight)
        kernel: Any = getattr(self, "moe_kernel", None)
        if kernel is not None:  # weights that are loaded anew, while vLLM runs
            for kept, weight in zip(kernel.fused_experts.quantized, weights, strict=True):
                keep(_operands(kept), _operands(weight))
            return
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        kernel = self.moe_kernel = make_unquantized_moe_kernel(
            quant_config=self.moe_quant_config,
            moe_config=self.moe,
            backend=UnquantizedMoeBackend.CPU if current_platform.is_cpu() else UnquantizedMoeBackend.TRITON,
            experts_cls=self.experts_cls,
            routing_tables=layer._expert_routing_tables(),
        )
        for weight in weights:
            _operands(weight)  # of nvfp4 one is made at the first use: here, before a graph is captured
        kernel.fused_experts.quantized = tuple(weights)

    def _check_complete(self, layer: Any) -> None:
        if not self._loaded:  # made-up weights, parameters that a loader has copied as they are, or a layer left out
            if is_unloaded(layer.w13_weight_scale.data):
                raise ValueError(f"{layer.layer_name}: the checkpoint has no quantized weights of these experts")
            return
        for prefix, group in zip(("w13", "w2"), self.scheme.groups, strict=True):
            for part in self.scheme.parts(group):
                for shard in _PROJECTIONS[prefix] if part.role != "unread" else ():
                    for expert in self._own(layer):
                        if (f"{prefix}_{part.suffix}", shard, expert) not in self._loaded:
                            raise ValueError(f"{_stored_name(layer, shard, expert, part)} is missing in the checkpoint")
        self._loaded.clear()

    @staticmethod
    def _own(layer: Any) -> list[int]:
        """The experts of this rank, in their order here."""
        places = layer.expert_map_manager.expert_map
        if places is None:
            return list(range(layer.local_num_experts))
        own = [(place, expert) for expert, place in enumerate(places.tolist()) if place >= 0]
        return [expert for _, expert in sorted(own)]

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """What comes in is not quantized before it goes to our experts."""
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        values = self.scheme.parts(0)[0].suffix
        kernel: Any = self.moe_kernel
        result: Tensor = kernel.apply(
            hidden_states=x,
            w1=getattr(layer, f"w13_{values}"),
            w2=getattr(layer, f"w2_{values}"),
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )
        return result


def _unread(
    param: Any, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int, return_success: bool = False
) -> bool | None:
    """The loader of a part that nothing reads, such as scales of activations."""
    return True if return_success else None


def _operands(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that a product reads."""
    row_scales = weight.kernel_row_scales
    return weight.tensors() | ({} if row_scales is None else {"row_scales": row_scales})


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _projection(layer: Any, shard_id: str) -> str:
    names = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}
    return str(names[shard_id])


def _stored_name(layer: Any, shard_id: str, expert_id: int, part: Part) -> str:
    return f"{layer.layer_name}.{expert_id}.{_projection(layer, shard_id)}.{part.suffix}"
