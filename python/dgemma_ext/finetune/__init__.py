"""Fine-tuning: low-rank adapters for both passes, trained over the weights that generation reads.

`data` reads examples, and `recipe` makes of them, with `draws`, what a step computes; `forward` are the two passes with
gradients and `loss` their losses; `adapter` holds the trained factors; `run` makes steps, `evaluate` has the real
sampler answer held-out prompts, `files` writes what is kept. No other library is needed: PEFT's files are safetensors.
"""

from __future__ import annotations

from dgemma_ext.finetune.adapter import TrainedAdapter
from dgemma_ext.finetune.data import Examples
from dgemma_ext.finetune.evaluate import Evaluation
from dgemma_ext.finetune.memory import training_sizes
from dgemma_ext.finetune.run import Report, Run, check_formats, open_examples
from dgemma_ext.finetune.settings import PASSES, TARGETS, FinetuneSettings, LoraSettings
