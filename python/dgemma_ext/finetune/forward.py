"""The two passes with gradients: the model's formulas over the frozen weights, with the factors beside them.

The weights are those that generation reads, quantized ones too. The order of operations and the roundings are those of
transformers' modeling_diffusion_gemma.py, which tests hold loss and gradients to. It does not train itself: its modules
take no quantized experts, its encode pass keeps all activations, and PEFT gives each pass an adapter of its own.

A batch is a matrix of token ids, shorter rows padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dgemma_ext.checkpoint import LayerConfig, Weight
from dgemma_ext.finetune.adapter import DECODER, ENCODER, TrainedAdapter, expert_factors, low_rank
from dgemma_ext.model import Network
from dgemma_ext.model.weights import LayerWeights
from dgemma_ext.ops import gradients
from dgemma_ext.ops.plain import layer as plain
from dgemma_ext.ops.plain import router as plain_router

# A layer's keys and values of the encode pass, [batch, positions, key heads, head dim] each.
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prefix:
    """What the encode pass leaves to the denoising pass: keys and values of every layer, gradients flow through."""

    layers: list[KeysValues]

    def rows(self, chosen: Tensor) -> Prefix:
        """Those of some rows of the batch, without gradients."""
        return Prefix([(key.detach()[chosen], value.detach()[chosen]) for key, value in self.layers])


class Passes:
    """encode and denoise of a network with an adapter.

    recompute: whether a layer's activations are computed again in backward in place of being kept.
    """

    def __init__(self, network: Network, adapter: TrainedAdapter, recompute: bool = False) -> None:
        self.network = network
        self.adapter = adapter
        self.recompute = recompute

    def encode(self, ids: Tensor, needs_output: bool) -> tuple[Prefix, Tensor | None]:
        """The causal pass over ids [B, T]. Returns the prefix and, where asked for, the head's input [B, T, hidden].

        What padding on the right computes is seen by no position before it.
        """
        config = self.network.config
        hidden = self._embedded(ids)
        tables = self.network.rotary_tables(_repeated(torch.arange(ids.shape[1], device=ids.device), len(ids)))
        stored: list[KeysValues] = []
        for layer in config.layers:
            rows = _Rows(ENCODER, ids.shape, tables[layer.rope, layer.head_dim])
            if layer.index == len(config.layers) - 1 and not needs_output:
                _, key, value = self._heads(layer, hidden, rows)
                stored.append((key, value))
                return Prefix(stored), None
            hidden, key, value = self._run(self._encoder_layer, layer, rows, hidden)
            stored.append((key, value))
        return Prefix(stored), self._normed_output(hidden).view(*ids.shape, -1)

    def denoise(self, canvas: Tensor, prefix: Prefix, lengths: Tensor, soft_embedding: Tensor | None) -> Tensor:
        """The bidirectional pass over canvas [B, L] behind lengths [B] positions of the prefix: the head's input, [B,
        L, hidden]. soft_embedding: [B, L, hidden], zero in rows without self-conditioning; None is zero in all."""
        config = self.network.config
        hidden = self._embedded(canvas)
        if soft_embedding is not None:
            hidden = hidden + self._self_conditioning(soft_embedding.flatten(0, 1))
        hidden = plain.rms_norm(hidden, None, config.rms_norm_eps)
        positions = lengths[:, None] + torch.arange(canvas.shape[1], device=canvas.device)
        tables = self.network.rotary_tables(positions.reshape(-1))
        slots = torch.arange(len(canvas), dtype=torch.int32, device=canvas.device)
        for layer in config.layers:
            own = tables[layer.rope, layer.head_dim]
            rows = _Rows(DECODER, canvas.shape, own, slots, lengths.to(torch.int32))
            hidden = self._run(self._decoder_layer, layer, rows, hidden, *prefix.layers[layer.index])
        return self._normed_output(hidden).view(*canvas.shape, -1)

    # Layers -----------------------------------------------------------------------------------------------------------

    def _run(self, function: Callable[..., Any], layer: LayerConfig, rows: _Rows, *tensors: Tensor) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, layer, rows, *tensors, use_reentrant=False)
        return function(layer, rows, *tensors)

    def _encoder_layer(self, layer: LayerConfig, rows: _Rows, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self._heads(layer, hidden, rows)
        none = key.new_empty((key.shape[0], 0, *key.shape[2:]))
        slots = torch.arange(len(key), dtype=torch.int32, device=key.device)
        cached = (none, none, slots, torch.zeros_like(slots))
        attended = gradients.causal_attention(query, key, value, *cached, window=layer.sliding_window)
        return self._after_attention(layer, hidden, attended, rows), key, value

    def _decoder_layer(
        self, layer: LayerConfig, rows: _Rows, hidden: Tensor, prefix_key: Tensor, prefix_value: Tensor
    ) -> Tensor:
        assert rows.slots is not None
        assert rows.lengths is not None
        cached = (prefix_key, prefix_value, rows.slots, rows.lengths)
        own = self._heads(layer, hidden, rows)
        attended = gradients.canvas_attention(*own, *cached, window=layer.sliding_window)
        return self._after_attention(layer, hidden, attended, rows)

    def _heads(self, layer: LayerConfig, hidden: Tensor, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, [B, n, heads, head dim]."""
        weights, epsilon = self.network.weights.layers[layer.index], self.network.config.rms_norm_eps
        normed = plain.rms_norm(hidden, weights.input_layernorm, epsilon)
        shape = (normed.shape[0], -1, layer.head_dim)
        linear = _Linear(self.adapter, rows.which, layer.index)
        query, key = (linear(normed, getattr(weights, name), name).view(shape) for name in ("q_proj", "k_proj"))
        value = None if weights.v_proj is None else linear(normed, weights.v_proj, "v_proj").view(shape)
        made = plain.normalise_heads(query, key, value, weights.q_norm, weights.k_norm, *rows.tables, epsilon)
        first, second, third = (tensor.unflatten(0, rows.shape) for tensor in made)
        return first, second, third

    def _after_attention(self, layer: LayerConfig, hidden: Tensor, attended: Tensor, rows: _Rows) -> Tensor:
        """The rest of a layer, [rows, hidden]."""
        weights, epsilon = self.network.weights.layers[layer.index], self.network.config.rms_norm_eps
        linear = _Linear(self.adapter, rows.which, layer.index)
        residual, mlp_input, experts_input = plain.attention_residual(
            hidden,
            linear(attended.flatten(0, 1).flatten(1), weights.o_proj, "o_proj"),
            weights.post_attention_layernorm,
            weights.pre_feedforward_layernorm,
            weights.pre_feedforward_layernorm_2,
            epsilon,
        )
        gate, up = (linear(mlp_input, getattr(weights, name), name) for name in ("gate_proj", "up_proj"))
        mlp_output = linear(plain.gelu_product(gate, up), weights.down_proj, "down_proj")
        moe_output = self._experts(weights, residual, experts_input, linear)
        combined = plain.rms_norm(mlp_output, weights.post_feedforward_layernorm_1, epsilon)
        combined = combined + plain.rms_norm(moe_output, weights.post_feedforward_layernorm_2, epsilon)
        scalar = weights.decoder_layer_scalar if rows.which == DECODER else weights.encoder_layer_scalar
        return (residual + plain.rms_norm(combined, weights.post_feedforward_layernorm, epsilon)) * scalar

    def _experts(self, weights: LayerWeights, residual: Tensor, experts_input: Tensor, linear: _Linear) -> Tensor:
        config, adapter = self.network.config, self.adapter
        scaled = plain_router.scaled_input(residual, weights.router_scale, config.rms_norm_eps)
        scores = linear(scaled, weights.router_proj, "router_proj")
        ids, expert_weights = plain_router.choose(scores, weights.router_per_expert_scale, config.top_k_experts)
        one, two = (linear.factor(name) for name in ("experts_gate_up", "experts_down"))
        return gradients.moe_ffn(
            experts_input,
            ids,
            expert_weights,
            weights.experts_gate_up,
            weights.experts_down,
            expert_factors(one, adapter.scale, experts_input.dtype),
            expert_factors(two, adapter.scale, experts_input.dtype),
        )

    # Around the layers ------------------------------------------------------------------------------------------------

    def _embedded(self, ids: Tensor) -> Tensor:
        """Scaled embeddings of ids [B, n], [B * n, hidden]."""
        table = self.network.weights.embed_tokens
        return functional.embedding(ids.reshape(-1), table) * self.network.embedding_scale

    def _self_conditioning(self, soft: Tensor) -> Tensor:
        weights, linear = self.network.weights, _Linear(self.adapter, DECODER, None)
        normed = plain.rms_norm(soft, weights.self_conditioning_pre_norm, self.network.config.rms_norm_eps)
        gate, up = (
            linear(normed, getattr(weights, name), name)
            for name in ("self_conditioning_gate_proj", "self_conditioning_up_proj")
        )
        name = "self_conditioning_down_proj"
        return linear(plain.gelu_product(gate, up), weights.self_conditioning_down_proj, name)

    def _normed_output(self, hidden: Tensor) -> Tensor:
        return plain.rms_norm(hidden, self.network.weights.norm, self.network.config.rms_norm_eps)


@dataclass(frozen=True)
class _Rows:
    """What the rows of a pass have in common. shape: [B, n]; slots, lengths: of the canvases' prefixes."""

    which: str
    shape: torch.Size
    tables: tuple[Tensor, Tensor]
    slots: Tensor | None = None
    lengths: Tensor | None = None


@dataclass(frozen=True)
class _Linear:
    """Products of one layer of one pass with their low-rank terms."""

    adapter: TrainedAdapter
    which: str
    layer: int | None

    def factor(self, attribute: str) -> Any:
        return self.adapter.factors(self.which).get((self.layer, attribute))

    def __call__(self, x: Tensor, weight: Weight, attribute: str) -> Tensor:
        return gradients.linear(x, weight) + low_rank(x, self.factor(attribute), self.adapter.scale)


def _repeated(positions: Tensor, rows: int) -> Tensor:
    """Positions [n] for each row of a batch, [rows * n]."""
    return positions.expand(rows, -1).reshape(-1)
