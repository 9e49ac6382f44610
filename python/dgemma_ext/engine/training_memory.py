"""How many bytes a step of training takes beside the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dgemma_ext.checkpoint import ModelConfig
from dgemma_ext.ops.formats import FORMATS
from dgemma_ext.ops.gradients.grouped_products import EXPERTS_AT_ONCE
from dgemma_ext.ops.gradients.head import ROWS_AT_ONCE


@dataclass(frozen=True)
class TrainingSizes:
    """What training takes memory for. parameters: numbers that are trained. batch, length: examples that go through the
    model together, and positions of the longest with its answer. recompute: whether backward computes a layer's
    activations again."""

    parameters: int
    batch: int
    length: int
    recompute: bool

    @property
    def trained_bytes(self) -> int:
        """Factors, their gradients and two moments of AdamW, in float32."""
        return 16 * self.parameters


def backward_bytes(training: TrainingSizes, config: ModelConfig, dtype: torch.dtype, experts: str) -> int:
    """What a step keeps from its forward to its backward, and what a layer's backward takes at once.

    For each position a layer keeps, in float32, the inputs of its norms (residual three times, attention's output, MLP,
    experts, their sum; raw queries, keys and values), and in the dtype what attention and low-rank products take.
    """
    size, hidden, dense = dtype.itemsize, config.hidden_size, config.intermediate_size
    positions = training.batch * (training.length + config.canvas_length)
    kept = 0
    for layer in config.layers:
        heads = (config.num_attention_heads + 2 * layer.num_key_value_heads) * layer.head_dim
        queries = config.num_attention_heads * layer.head_dim
        whole = 4 * (8 * hidden + heads) + size * (3 * hidden + heads + queries + 4 * dense)
        cached = 2 * layer.num_key_value_heads * layer.head_dim * size
        kept += (hidden * size + cached) if training.recompute else whole
    rows = training.batch * training.length * config.top_k_experts
    # Of a layer's experts: inputs, gate and up, and their gradients; and a few dequantized experts.
    of_experts = rows * (3 * size * hidden + 40 * config.moe_intermediate_size)
    if any(format in FORMATS for format in experts.split(", ")):
        of_experts += 3 * EXPERTS_AT_ONCE * config.moe_intermediate_size * hidden * size
    of_head = ROWS_AT_ONCE * config.vocab_size * (size + 12)
    return positions * kept + (positions * whole if training.recompute else 0) + max(of_experts, of_head)
