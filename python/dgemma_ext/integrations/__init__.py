"""This package's kernels inside other libraries, which are imported only when they are used."""

from __future__ import annotations

from typing import Any, TypeVar

from dgemma_ext.arguments import flag
from dgemma_ext.environment import check_environment

Model = TypeVar("Model")


def accelerate(model: Model, enabled: bool = True) -> Model:
    """Makes a DiffusionGemma of Hugging Face transformers run on this package's kernels, in place.

    model: a `DiffusionGemmaForBlockDiffusion`, or a PEFT model around one. `enabled=False` undoes it. Attention, the
    experts and, in `generate`, the sampler with its self-conditioning are replaced; weights are neither copied, moved
    nor renamed. A part that cannot run on the kernels runs on transformers' own code, with one warning
    (`integrations.transformers.AccelerationWarning`) for each model and reason. Details:
    `dgemma_ext.integrations.transformers`.

    Returns the model. Raises ValueError for another kind of model, for quantized weights and for a transformers older
    than 5.17.
    """
    from dgemma_ext.integrations import transformers as integration

    check_environment()
    unchecked: Any = model
    integration.accelerate(unchecked, flag("enabled", enabled))
    return model
