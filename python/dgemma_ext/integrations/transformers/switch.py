"""Puts the kernels into a model of transformers, part by part, and takes them out again."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from dgemma_ext.integrations.transformers import adapted_experts, attention, denoising, experts
from dgemma_ext.integrations.transformers.fallback import Acceleration

# The name of the implementations in transformers' registers and in the model's configuration.
IMPLEMENTATION = "dgemma_ext"
PARTS = ("attention", "experts", "sampler")

# At import, and so before a model that was saved whole is loaded again: it knows its implementations by name.
attention.register(IMPLEMENTATION)
experts.register(IMPLEMENTATION)


def enable(base: Any, without: Mapping[str, str]) -> None:
    """Replaces every part but those of `without` (part → reason), which give a warning with their reason."""
    if "experts" not in without:
        # Again each time: an adapter may have come since.
        adapted_experts.replace_forwards(base)
    if getattr(base, "_dgemma_acceleration", None) is not None:
        return
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
    if "attention" not in without:
        base.set_attn_implementation(dict.fromkeys(configs, IMPLEMENTATION))
    if "experts" not in without:
        base.set_experts_implementation(dict.fromkeys(configs, IMPLEMENTATION))
    reasons = dict(without)
    if "sampler" not in without:
        unknown = denoising.unknown_arguments(base)
        if unknown is None:
            # A partial object, unlike a bound method, is pickled and copied with the model that it belongs to.
            base._denoising_step = functools.partial(denoising.denoising_step, base)
        else:
            reasons["sampler"] = unknown
    for part, reason in reasons.items():
        state.fall_back(part, reason)


def disable(base: Any) -> None:
    """Undoes `enable`."""
    state = getattr(base, "_dgemma_acceleration", None)
    if state is None:
        return
    adapted_experts.restore_forwards(base)
    base.set_attn_implementation(state.attention)
    base.set_experts_implementation(state.experts)
    base.__dict__.pop("_denoising_step", None)
    for module in base.modules():
        module.__dict__.pop("_dgemma_acceleration", None)
