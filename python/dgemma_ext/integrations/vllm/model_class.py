"""The part `sampler`: hands vLLM the model's class, and a check of requests before they are admitted."""

from __future__ import annotations


def register() -> None:
    """The class goes by its name, so that vLLM imports it where it loads such a model and nowhere else."""
    from vllm import ModelRegistry

    from dgemma_ext.integrations.vllm import admission, configuration

    ModelRegistry.register_model(configuration.ARCHITECTURE, "dgemma_ext.integrations.vllm.model:DiffusionGemma")
    configuration.add(admission.add_admission)
