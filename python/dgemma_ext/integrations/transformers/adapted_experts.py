"""Experts with a LoRA of PEFT: four low-rank products beside the experts' own.

PEFT wraps the experts once for each of their parameters, and makes W + B A anew at every call: at the published size
1.5 GB a layer, which takes 24 times as long as the experts themselves. Here the outer wrapper's forward is replaced; it
reads the factors of all wrappers and lets `ops.gradients.moe_ffn` multiply by them. What that cannot do (several active
adapters, one that is merged, weights that no kernel takes) is left to PEFT's own forward.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from dgemma_ext.integrations.transformers import experts
from dgemma_ext.integrations.transformers.fallback import acceleration_of
from dgemma_ext.ops import gradients
from dgemma_ext.ops.gradients import ExpertFactors


def replace_forwards(base: Any) -> None:
    """Replaces the forward of every wrapper of PEFT around experts."""
    wrapper_class = _wrapper_class()
    if wrapper_class is None:
        return
    for module in base.modules():
        inner = getattr(module, "experts", None)
        if isinstance(inner, wrapper_class) and isinstance(inner.get_base_layer(), experts.experts_class()):
            # A partial object, unlike a bound method, is pickled and copied with the module that it belongs to.
            inner.forward = functools.partial(_forward, inner)


def restore_forwards(base: Any) -> None:
    for module in base.modules():
        own = module.__dict__.get("forward")
        if isinstance(own, functools.partial) and own.func is _forward:
            del module.__dict__["forward"]


def _wrapper_class() -> Any:
    """PEFT's ParamWrapper; None where PEFT is not loaded, or has none."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    return getattr(layer, "ParamWrapper", None)


def _forward(wrapper: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Any:
    """The wrapper's forward: x [tokens, hidden], then the router's ids and weights, [tokens, top k] each."""
    module = wrapper.get_base_layer()
    factors = None if keywords or len(arguments) != 2 or torch.compiler.is_compiling() else _factors(wrapper, x.dtype)
    if factors is None:
        return type(wrapper).forward(wrapper, x, *arguments, **keywords)
    reason = experts.refused(module, x, module.gate_up_proj, module.down_proj)
    if reason is not None:
        acceleration_of(module).fall_back("experts", reason)
        return type(wrapper).forward(wrapper, x, *arguments, **keywords)
    ids, weights = arguments
    return gradients.moe_ffn(
        x.contiguous(),
        ids.to(torch.int32).contiguous(),
        weights.float().contiguous(),
        module.gate_up_proj,
        module.down_proj,
        factors.get("gate_up_proj"),
        factors.get("down_proj"),
    )


def _factors(wrapper: Any, dtype: torch.dtype) -> dict[str, ExpertFactors] | None:
    """Parameter of the experts → factors of the one active adapter. None where PEFT's own forward is wanted."""
    found: dict[str, ExpertFactors] = {}
    while isinstance(wrapper, _wrapper_class()):
        active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if wrapper.disable_adapters or wrapper.merged or len(active) > 1:
            return None
        for name in active:
            found[wrapper.parameter_name] = _factors_of(wrapper, name, dtype)
        wrapper = wrapper.base_layer
    return found


def _factors_of(wrapper: Any, name: str, dtype: torch.dtype) -> ExpertFactors:
    """A [experts * rank, in] has the experts one after another, B [out, rank * experts] an expert's columns strided by
    their number. Releases before 0.19 exchange in and out."""
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    a = a.reshape(wrapper.num_experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1)
    if not getattr(wrapper, "_did_swap_in_out_features", False):
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return ExpertFactors(a.to(dtype).contiguous(), b.to(dtype).contiguous(), wrapper.scaling[name])
