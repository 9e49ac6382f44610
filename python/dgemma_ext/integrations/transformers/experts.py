"""The experts of transformers' DiffusionGemma by `ops.grouped_gemm.moe_ffn`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modeling

from dgemma_ext.integrations.transformers.fallback import acceleration_of, tensors_refused
from dgemma_ext.ops import grouped_gemm

# Both the name of the published configuration's activation; the kernels have no other.
_ACTIVATION = "gelu_pytorch_tanh"
# What the CUDA kernels want of hidden and expert size; csrc/grouped_gemm/plan_cuda.cpp.
_CUDA_MULTIPLE = 8


def register(name: str) -> None:
    ExpertsInterface.register(name, experts_forward)


def experts_class() -> type[nn.Module]:
    found: type[nn.Module] = modeling.DiffusionGemmaTextExperts
    return found


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts function of transformers' ExpertsInterface: hidden_states [tokens, hidden], the rest [tokens, top k].

    The weights are read once, because PEFT makes them anew at every look where a LoRA is on them.
    """
    gate_up, down = module.gate_up_proj, module.down_proj
    reason = None if torch.compiler.is_compiling() else _refused(module, hidden_states, gate_up, down)
    if reason is not None:
        acceleration_of(module).fall_back("experts", reason)
    if reason is not None or torch.compiler.is_compiling():
        return _own(module)(module, hidden_states, top_k_index, top_k_weights)
    return grouped_gemm.moe_ffn(
        hidden_states.contiguous(),
        top_k_index.to(torch.int32).contiguous(),
        top_k_weights.float().contiguous(),
        gate_up.contiguous(),
        down.contiguous(),
    )


def _refused(module: Any, hidden_states: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    if len(gate_up) != module.config.num_experts:
        return "its experts are spread over several devices"
    activation = module.config.hidden_activation
    if activation != _ACTIVATION:
        return f"its activation is {activation}, and the kernels have {_ACTIVATION}"
    if hidden_states.is_cuda and (gate_up.shape[2] % _CUDA_MULTIPLE or down.shape[2] % _CUDA_MULTIPLE):
        return f"no kernel of cuda takes experts of {down.shape[2]} and a hidden size of {gate_up.shape[2]}"
    return tensors_refused(hidden_states, gate_up, down)


def _own(module: Any) -> Any:
    """What the model ran before: an entry of transformers' register, or the class's own forward."""
    name = acceleration_of(module).experts.get("text_config")
    if name is not None and name in ALL_EXPERTS_FUNCTIONS:
        return ALL_EXPERTS_FUNCTIONS[name]
    # The decorator that looks implementations up has kept what it wraps.
    return type(module).forward.__wrapped__
