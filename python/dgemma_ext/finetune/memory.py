"""What a run takes memory for, known before anything is loaded."""

from __future__ import annotations

from dgemma_ext.checkpoint import ModelConfig
from dgemma_ext.engine import TrainingSizes
from dgemma_ext.finetune.adapter import factor_sizes
from dgemma_ext.finetune.data import Examples
from dgemma_ext.finetune.settings import FinetuneSettings


def training_sizes(
    config: ModelConfig, settings: FinetuneSettings, examples: Examples, recompute: bool
) -> TrainingSizes:
    """The sizes of a run's steps, for `engine.memory_plan`."""
    canvas = config.canvas_length
    # The last canvas of an answer is filled.
    length = examples.length + canvas - 1
    parameters = factor_sizes(config, settings.lora)
    return TrainingSizes(parameters, settings.pass_batch, length, recompute)
