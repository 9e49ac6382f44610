"""transformers' DiffusionGemma on this package's kernels: `dg.accelerate(model)`.

Three parts of the model are replaced, and restored by `dg.accelerate(model, enabled=False)`:

- attention, an implementation registered with transformers' AttentionInterface and, for masks, with its
  AttentionMaskInterface (attention.py, visibility.py);
- the experts, an implementation registered with its ExpertsInterface (experts.py), with a LoRA of PEFT on them by its
  factors (adapted_experts.py: `accelerate` after the adapter is there, or again);
- the part of a denoising step of `generate` after the decoder, with the next step's self-conditioning (denoising.py),
  for which transformers has no interface: it is a private method.

A release of transformers that is newer than the tests have seen is tried once, on a small model (trial.py); a part that
fails there is not replaced. An accelerated model can be pickled, copied and saved as before; where it is loaded again
in another process, this package is needed.

Both train: gradients of activations, routing weights and low-rank factors flow through them, while gradients of the
model's own experts are left to transformers' code.

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

from typing import Any

from torch import nn

from dgemma_ext.integrations.transformers import experts, trial
from dgemma_ext.integrations.transformers.fallback import AccelerationWarning
from dgemma_ext.integrations.transformers.releases import NEWEST_TESTED, OLDEST, release, release_name
from dgemma_ext.integrations.transformers.switch import IMPLEMENTATION, disable, enable

__all__ = ["IMPLEMENTATION", "AccelerationWarning", "accelerate"]


def accelerate(model: nn.Module, enabled: bool = True) -> nn.Module:
    """See `dgemma_ext.accelerate`."""
    base = _diffusion_gemma(model)
    if enabled:
        _check_weights(base)
        enable(base, trial.failed_parts(release_name()) if release() > NEWEST_TESTED else {})
    else:
        disable(base)
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
        raise ValueError(f"model: got weights quantized by {getattr(method, 'value', method)}, wants plain ones")
    for name, module in base.named_modules():
        if not isinstance(module, experts.experts_class()):
            continue
        for tensor in ("gate_up_proj", "down_proj"):
            weight = getattr(module, tensor, None)
            if weight is None or not weight.is_floating_point() or weight.itemsize < 2:
                got = "nothing" if weight is None else str(weight.dtype)
                raise ValueError(f"model: got {got} in {name}.{tensor}, wants weights of 16 bits or more")
