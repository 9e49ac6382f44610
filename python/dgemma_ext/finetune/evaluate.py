"""How well the adapter answers held-out prompts: the real sampler over the same weights, the factors as they are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dgemma_ext.checkpoint import Adapter
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.finetune.adapter import TrainedAdapter
from dgemma_ext.finetune.data import Example

# The adapter's name while its answers are judged.
_NAME = "in training"
# Prompts that are answered together.
BATCH = 32


@dataclass(frozen=True)
class Evaluation:
    """exact_match: the share of answers that are the response, without white space around them. denoising_steps: of an
    answer, on average; tokens_per_forward: tokens of all answers by steps of all."""

    exact_match: float
    denoising_steps: float
    tokens_per_forward: float
    count: int


def evaluate(model: DiffusionGemma, adapter: TrainedAdapter, examples: Sequence[Example], seed: int) -> Evaluation:
    """Answers the examples' prompts with the checkpoint's own sampler settings. Example i samples with seed + i."""
    right, steps, tokens = 0, [], 0
    model.load_adapter(_NAME, Adapter.from_tensors(adapter.peft_config(""), adapter.peft_tensors(), model.config))
    try:
        for begin in range(0, len(examples), BATCH):
            some = examples[begin : begin + BATCH]
            outputs = model.generate(
                [list(example.prompt) for example in some],
                max_new_tokens=max(len(example.answer) for example in some),
                seed=[seed + begin + row for row in range(len(some))],
                adapter=_NAME,
            )
            for output, example in zip(outputs, some, strict=True):
                right += output.text.strip() == example.response.strip()
                steps.append(sum(output.denoising_steps))
                tokens += len(output.token_ids)
    finally:
        model.unload_adapter(_NAME)
    return Evaluation(right / len(examples), statistics.mean(steps), tokens / sum(steps), len(examples))
