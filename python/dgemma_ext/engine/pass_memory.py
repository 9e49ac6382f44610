"""The memory that a pass takes beside weights, cache and logits: the largest workspace of an operator, and rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from dgemma_ext.checkpoint import ModelConfig
from dgemma_ext.ops.block_attention import attention_workspace_bytes
from dgemma_ext.ops.denoise import soft_embedding_workspace
from dgemma_ext.ops.formats import FORMATS
from dgemma_ext.ops.weights import dense_workspace_bytes, experts_workspace_bytes

# A dense weight: its format, or None for a tensor; its rows; its columns.
DenseMatrix = tuple[str | None, int, int]


@dataclass(frozen=True)
class PassMemory:
    """What the memory of a pass depends on beside its positions.

    formats: those of the experts' weights; a name that is no quantized format stands for unquantized weights. dense:
    the different matrices of the dense products that are our own. activations: "fp8" where the experts' inputs are
    rounded to it.
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    formats: Collection[str]
    dense: Collection[DenseMatrix]
    activations: str | None

    def workspace(self, positions: int) -> int:
        """The largest memory that a pass over `positions`, or the soft embedding of a canvas, takes beside weights,
        cache and logits."""
        config = self.config
        soft = soft_embedding_workspace(1, config.canvas_length, config.vocab_size, config.hidden_size, self.device)
        return max(self._largest_operator(positions), soft) + self._rows(positions)

    def step(self, positions: int) -> int:
        """What a step over `positions` takes: the largest workspace of an operator, and what a layer holds at once."""
        return self._largest_operator(positions) + self._rows(positions)

    def _largest_operator(self, positions: int) -> int:
        return max(self._attention(positions), self._experts(positions), self._dense(positions))

    def _attention(self, positions: int) -> int:
        heads = self.config.num_attention_heads
        return max(
            attention_workspace_bytes(1, positions, heads, layer.num_key_value_heads, layer.head_dim, self.device)
            for layer in set(self.config.layers)
        )

    def _experts(self, positions: int) -> int:
        config = self.config
        return max(
            experts_workspace_bytes(
                positions,
                config.hidden_size,
                config.moe_intermediate_size,
                config.num_experts,
                config.top_k_experts,
                dtype=self.dtype,
                device=self.device,
                format=format if format in FORMATS else None,
                activations=self.activations,
            )
            for format in self.formats
        )

    def _dense(self, positions: int) -> int:
        """For the rows of a pass, or of one canvas: where rows are few, a GPU takes memory for the parts of a sum."""
        return max(
            (
                dense_workspace_bytes(rows, columns, out, dtype=self.dtype, device=self.device, format=format)
                for format, out, columns in self.dense
                for rows in {positions, min(positions, self.config.canvas_length)}
            ),
            default=0,
        )

    def _rows(self, positions: int) -> int:
        """What a layer holds at once, for each row: residual, three norms and two outputs of hidden size; gate, up and
        product of the dense MLP; projections and their rotated forms."""
        config = self.config
        projections = max(
            (config.num_attention_heads + 2 * layer.num_key_value_heads) * layer.head_dim for layer in config.layers
        )
        row = 6 * config.hidden_size + 3 * config.intermediate_size + 2 * projections
        return positions * row * self.dtype.itemsize
