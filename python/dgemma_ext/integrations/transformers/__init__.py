"""transformers' DiffusionGemma on this package's kernels: `dg.accelerate(model)`.

Three parts of the model are replaced, and restored by `dg.accelerate(model, enabled=False)`:

- attention, an implementation registered with transformers' AttentionInterface and, for masks, with its
  AttentionMaskInterface (attention.py, visibility.py);
- the experts, an implementation registered with its ExpertsInterface (experts.py);
- the part of a denoising step of `generate` after the decoder, with the next step's self-conditioning (denoising.py).
  transformers has no interface for it, so it is replaced only in releases that were tested.

Everything else runs on transformers: norms, rotations, projections, router, dense MLP, vision tower, caches, streamers,
stopping at an end of text. Hooks and adapters (PEFT's LoRA) on any of its modules work as before.

Inside torch.compile everything runs on transformers' own code, because reading a mask would break the graph. `generate`
warns about it where it compiles its loop (for a static cache); a model that you compile yourself does not.

Random numbers: at the first step of each canvas one seed per row is drawn from torch's generator, and the sampler's
counter-based numbers follow from it. So `torch.manual_seed` makes a generation repeatable. Its tokens are not those
that transformers' sampler draws after the same seed, but their distribution is the same. transformers draws the first
canvas of noise.

Positions that the attention mask hides get zeros from attention, where transformers computes other values; nothing
reads them.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from dgemma_ext.integrations.transformers import attention, denoising, experts
from dgemma_ext.integrations.transformers.fallback import Acceleration, AccelerationWarning
from dgemma_ext.integrations.transformers.releases import OLDEST, release, release_name

__all__ = ["IMPLEMENTATION", "AccelerationWarning", "accelerate"]

# The name of the implementations in transformers' registers and in the model's configuration.
IMPLEMENTATION = "dgemma_ext"


def accelerate(model: nn.Module, enabled: bool = True) -> nn.Module:
    """See `dgemma_ext.accelerate`."""
    base = _diffusion_gemma(model)
    if enabled:
        _check_weights(base)
        _enable(base)
    else:
        _disable(base)
    return model


def _diffusion_gemma(model: Any) -> Any:
    """The DiffusionGemmaForBlockDiffusion itself, without PEFT's wrapper."""
    if release() < OLDEST:
        raise ValueError(f"transformers: got {release_name()}, wants {'.'.join(map(str, OLDEST))} or later")
    from transformers import DiffusionGemmaForBlockDiffusion

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, DiffusionGemmaForBlockDiffusion):
        raise ValueError(f"model: got {type(base).__name__}, wants transformers' DiffusionGemmaForBlockDiffusion")
    return base


def _check_weights(base: Any) -> None:
    method = getattr(base, "quantization_method", None)
    if method is not None:
        raise ValueError(f"model: got weights quantised by {getattr(method, 'value', method)}, wants plain ones")
    for name, module in base.named_modules():
        if not isinstance(module, experts.experts_class()):
            continue
        for tensor in ("gate_up_proj", "down_proj"):
            weight = getattr(module, tensor, None)
            if weight is None or not weight.is_floating_point() or weight.itemsize < 2:
                got = "nothing" if weight is None else str(weight.dtype)
                raise ValueError(f"model: got {got} in {name}.{tensor}, wants weights of 16 bits or more")


def _enable(base: Any) -> None:
    if getattr(base, "_dgemma_acceleration", None) is not None:
        return
    attention.register(IMPLEMENTATION)
    experts.register(IMPLEMENTATION)
    configs = {"": base.config, "text_config": base.config.text_config}
    state = Acceleration(
        attention={key: config._attn_implementation for key, config in configs.items()},
        experts={key: config._experts_implementation for key, config in configs.items()},
    )
    base._dgemma_acceleration = state
    for module in base.modules():
        if isinstance(module, (*attention.attention_classes(), experts.experts_class())):
            module.__dict__["_dgemma_acceleration"] = state
    # Set by sub-configuration, so that the vision tower keeps its implementation.
    base.set_attn_implementation(dict.fromkeys(configs, IMPLEMENTATION))
    base.set_experts_implementation(dict.fromkeys(configs, IMPLEMENTATION))
    unknown = denoising.unknown_release(base)
    if unknown is not None:
        state.fall_back("sampler", unknown)
    else:
        base._denoising_step = types.MethodType(denoising.denoising_step, base)


def _disable(base: Any) -> None:
    state = getattr(base, "_dgemma_acceleration", None)
    if state is None:
        return
    base.set_attn_implementation(state.attention)
    base.set_experts_implementation(state.experts)
    base.__dict__.pop("_denoising_step", None)
    for module in base.modules():
        module.__dict__.pop("_dgemma_acceleration", None)
