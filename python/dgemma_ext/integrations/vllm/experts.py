"""The part `experts`: grouped GEMM as vLLM's modular kernel of a mixture of experts.

vLLM keeps its router, its sharding over ranks and what brings tokens to their experts and back; the product of the
experts is ours. vLLM holds unquantized weights as this package does: gate and up of every expert [E, 2 I, H], the gate
first, and down [E, H, I]. Under expert parallelism a rank has some experts: the ids of the others become -1, whose rows
are left out.

DGEMMA_VLLM_EXPERTS (fp8, int8, int4, int4-64, int4-128, nvfp4) quantizes a rank's experts when they are loaded, one by
one. The experts of a checkpoint that is quantized already have a method of their own (quantized_experts.py), which a
configuration of the checkpoint hands out (quantization.py).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from dgemma_ext.checkpoint.quantization import Target, parse_target
from dgemma_ext.integrations.vllm import configuration, settings
from dgemma_ext.model.weights import quantized_weight
from dgemma_ext.ops import grouped_gemm
from dgemma_ext.ops import weights as weights_of_a_kind
from dgemma_ext.ops.formats import QuantizedWeight

_NAME = "UnquantizedFusedMoEMethod"


def register() -> None:
    """Puts our method in place of vLLM's unquantized one, by its registry of out-of-tree layers, and hands vLLM the
    configurations of quantized checkpoints."""
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    experts_target()  # refused before anything is loaded
    quantization = importlib.import_module("dgemma_ext.integrations.vllm.quantization")  # registers its configurations
    configuration.add(quantization.say_what_stays)
    taken = op_registry_oot.get(_NAME)
    if taken is not None:
        if not getattr(taken, "of_dgemma_ext", False):
            raise ValueError(
                f"the part experts wants vLLM's {_NAME}, in whose place {taken.__module__} has put its own"
            )
        return
    UnquantizedFusedMoEMethod.register_oot(_method(UnquantizedFusedMoEMethod))


def serves(moe: Any) -> bool:
    """Whether our kernel computes the experts of a layer of vLLM's: gated by tanh-GELU without biases, in bf16, or on a
    CPU in fp32."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.platforms import current_platform

    dtypes = (torch.bfloat16, torch.float32) if current_platform.is_cpu() else (torch.bfloat16,)
    is_cuda = current_platform.is_cuda() and current_platform.has_device_capability(80)
    gated = moe.activation == MoEActivation.GELU_TANH and moe.is_act_and_mul and not moe.has_bias
    return bool(gated and moe.in_dtype in dtypes and (is_cuda or current_platform.is_cpu()))


def _method(theirs: Any) -> type:
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.platforms import current_platform

    class Method(theirs):  # type: ignore[misc]
        """vLLM's method with our kernel, where it serves the layer; else vLLM's as it is."""

        of_dgemma_ext = True

        def __init__(self, moe: Any) -> None:
            super().__init__(moe)
            if serves(moe):
                # Of those that leave the weights as they were loaded.
                kept = UnquantizedMoeBackend.CPU if current_platform.is_cpu() else UnquantizedMoeBackend.TRITON
                self.unquantized_backend, self.experts_cls = kept, experts_class()

        def process_weights_after_loading(self, layer: Any) -> None:
            """Raises ValueError, naming the layer, for weights that are loaded anew where the experts were quantized:
            what they were quantized from is gone."""
            kernel = getattr(self, "moe_kernel", None)
            if kernel is not None and getattr(kernel.fused_experts, "quantized", None) is not None:
                raise ValueError(
                    f"{layer.layer_name}: DGEMMA_VLLM_EXPERTS has quantized its experts, and its weights cannot be "
                    "loaded anew; those of an unquantized model, or of a quantized checkpoint, can"
                )
            super().process_weights_after_loading(layer)

    Method.__name__ = Method.__qualname__ = "DGemmaUnquantizedFusedMoEMethod"
    return Method


_class: type | None = None


def experts_class() -> type:
    """vLLM's interface of a modular kernel, filled in. Made at the first call, so that importing this file imports
    nothing of vLLM."""
    global _class
    if _class is not None:
        return _class
    import vllm.model_executor.layers.fused_moe.modular_kernel as modular
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    class Experts(modular.FusedMoEExpertsModular):  # type: ignore[misc]
        """The experts' product. It weighs and adds up the experts of a token itself."""

        @staticmethod
        def activation_format() -> Any:
            return modular.FusedMoEActivationFormat.Standard

        @staticmethod
        def _supports_current_device() -> bool:
            return True

        @staticmethod
        def _supports_no_act_and_mul() -> bool:
            return False

        @staticmethod
        def _supports_activation(activation: Any) -> bool:
            return bool(activation == MoEActivation.GELU_TANH)

        @staticmethod
        def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
            return (weight_key, activation_key) == (None, None)

        @staticmethod
        def _supports_parallel_config(moe_parallel_config: Any) -> bool:
            return True

        @property
        def expects_unquantized_inputs(self) -> bool:
            return True

        def finalize_weight_and_reduce_impl(self) -> Any:
            return TopKWeightAndReduceNoOP()

        def workspace_shapes(self, M: int, N: int, K: int, *others: Any) -> tuple[tuple[int, ...], ...]:
            return (0,), (0,), (M, K)

        quantized: tuple[QuantizedWeight, QuantizedWeight] | None = None

        def process_weights_after_loading(self, layer: Any) -> None:
            """They stay as they are, or are quantized; then vLLM's own tensors keep their shapes and no memory."""
            target = experts_target()
            if target is None:
                return
            self.quantized = quantized_experts(layer.w13_weight.data, layer.w2_weight.data, target)
            for weight in (layer.w13_weight, layer.w2_weight):
                weight.data = weight.data.new_zeros(1).expand(weight.shape)

        def apply(
            self,
            output: Tensor,
            hidden_states: Tensor,
            w1: Tensor,
            w2: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            activation: Any,
            global_num_experts: int,
            expert_map: Tensor | None,
            a1q_scale: Tensor | None,
            a2_scale: Tensor | None,
            workspace13: Tensor,
            workspace2: Tensor,
            expert_tokens_meta: Any,
            apply_router_weight_on_input: bool,
        ) -> None:
            if apply_router_weight_on_input:
                raise ValueError("apply_router_weight_on_input is True, and our experts weigh what comes out of them")
            gate_up, down = self.quantized or (w1, w2)
            experts_product(hidden_states, topk_ids, topk_weights, gate_up, down, expert_map, output)

    _class = Experts
    return Experts


def experts_product(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    expert_map: Tensor | None,
    out: Tensor,
) -> None:
    """Writes the sum of each token's experts, as `moe_ffn` of the weights' kind has it, into `out` [tokens, H].

    ids, weights: [tokens, k]. expert_map: int32 [all experts], the place of an expert among this rank's or -1; None
    where the rank has all.
    """
    if expert_map is not None:
        ids = torch.where(ids < 0, -1, expert_map[ids.clamp(min=0).to(torch.int64)])
    chosen, shares = ids.to(torch.int32).contiguous(), weights.to(torch.float32).contiguous()
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        grouped_gemm.moe_ffn(hidden.contiguous(), chosen, shares, gate_up, down, out=out)
    else:
        out.copy_(weights_of_a_kind.experts(hidden.contiguous(), chosen, shares, gate_up, down))


def experts_target() -> Target | None:
    """What DGEMMA_VLLM_EXPERTS asks for; raises ValueError for a format that there is not."""
    named = settings.experts_format()
    return None if named is None else parse_target(named, ("experts",), "DGEMMA_VLLM_EXPERTS")


def quantized_experts(gate_up: Tensor, down: Tensor, target: Target) -> tuple[QuantizedWeight, QuantizedWeight]:
    """A rank's experts in a format. Raises ValueError where no group of the format divides their columns."""
    made = (quantized_weight("experts_gate_up", gate_up, target), quantized_weight("experts_down", down, target))
    for name, weight, source in zip(("gate_up", "down"), made, (gate_up, down), strict=True):
        if not isinstance(weight, QuantizedWeight):
            raise ValueError(
                f"DGEMMA_VLLM_EXPERTS is {target.format}, and no group of it divides the {source.shape[-1]} columns of "
                f"{name}, of which other ranks have the rest"
            )
    return made  # type: ignore[return-value]
