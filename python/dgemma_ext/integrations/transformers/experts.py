"""The experts of transformers' DiffusionGemma by `ops.grouped_gemm.moe_ffn`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modeling

from dgemma_ext.integrations.transformers.fallback import acceleration_of, needs_gradient, tensors_refused
from dgemma_ext.ops import gradients, grouped_gemm

# The activation of the published configuration, and the only one of the kernels.
_ACTIVATION = "gelu_pytorch_tanh"
# Hidden and expert size must be multiples of this for the CUDA kernels; csrc/grouped_gemm/cuda/plan_moe.cpp.
_CUDA_MULTIPLE = 8


def register(name: str) -> None:
    ExpertsInterface.register(name, experts_forward)


def experts_class() -> type[nn.Module]:
    found: type[nn.Module] = modeling.DiffusionGemmaTextExperts
    return found


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts function of transformers' ExpertsInterface: hidden_states [tokens, hidden], the rest [tokens, top k].

    The weights are read once, because with a LoRA on them PEFT computes them at every access.
    """
    gate_up, down = module.gate_up_proj, module.down_proj
    reason = None if torch.compiler.is_compiling() else refused(module, hidden_states, gate_up, down)
    if reason is not None:
        acceleration_of(module).fall_back("experts", reason)
    if reason is not None or torch.compiler.is_compiling():
        return _previous_forward(module)(module, hidden_states, top_k_index, top_k_weights)
    form = gradients.moe_ffn if needs_gradient(hidden_states, top_k_weights) else grouped_gemm.moe_ffn
    return form(
        hidden_states.contiguous(),
        top_k_index.to(torch.int32).contiguous(),
        top_k_weights.float().contiguous(),
        gate_up.contiguous(),
        down.contiguous(),
    )


def refused(module: Any, hidden_states: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    """The reason that no kernel computes these experts, or None."""
    if len(gate_up) != module.config.num_experts:
        return "its experts are spread over several devices"
    if needs_gradient(gate_up, down):
        return (
            "its weights are trained, or PEFT has made them of an adapter (dg.accelerate after PEFT reads its factors)"
        )
    activation = module.config.hidden_activation
    if activation != _ACTIVATION:
        return f"its activation is {activation}, and the kernels have {_ACTIVATION}"
    if hidden_states.is_cuda and (gate_up.shape[2] % _CUDA_MULTIPLE or down.shape[2] % _CUDA_MULTIPLE):
        return f"no kernel of cuda takes experts of {down.shape[2]} and a hidden size of {gate_up.shape[2]}"
    return tensors_refused(hidden_states, gate_up, down)


def _previous_forward(module: Any) -> Any:
    """The model's experts function before `accelerate`: an entry of transformers' register, or the class's forward."""
    name = acceleration_of(module).experts.get("text_config")
    if name is not None and name in ALL_EXPERTS_FUNCTIONS:
        return ALL_EXPERTS_FUNCTIONS[name]
    # The undecorated forward: the decorator would look the implementation up again.
    return type(module).forward.__wrapped__
