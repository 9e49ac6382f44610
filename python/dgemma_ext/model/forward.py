"""The forward pass: the rows that rows.py describes go through all layers once.

Encoding is a pass over chunks, denoising a pass over canvases; the first step of a canvas may have both. In every layer
a chunk's keys and values are appended to the cache before a canvas reads it, and a chunk's rows do not see canvases, so
the results are those of an encode pass followed by a denoising pass.

The order of operations and the roundings are those of transformers' modeling_diffusion_gemma.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext.checkpoint import LayerConfig, ModelConfig
from dgemma_ext.model.cache import Cache
from dgemma_ext.model.layers import project_qkv
from dgemma_ext.model.matmul import Matmul, MatmulMode
from dgemma_ext.model.rows import Canvases, PrefillChunk, Rows
from dgemma_ext.model.weights import LayerWeights, ModelWeights
from dgemma_ext.ops.block_attention import append_to_cache, canvas_attention, causal_attention
from dgemma_ext.ops.layer import attention_residual, layer_output, rms_norm


@dataclass(frozen=True)
class LayerInputs:
    """What goes into the products of one layer, a row for each token: `attention` [rows, hidden] into queries, keys and
    values, `attended` [rows, heads * head_dim] into the output projection, `mlp` and `experts` [rows, hidden] into the
    two feed-forwards, the latter by `expert_ids` [rows, top_k]."""

    layer: int
    weights: LayerWeights
    attention: Tensor
    attended: Tensor
    mlp: Tensor
    experts: Tensor
    expert_ids: Tensor


@dataclass
class ForwardOptions:
    """Options of a pass.

    embedding_scale: factor of the token embeddings. activations: "fp8" rounds the inputs of the experts' products.
    image_attention: on which layers the tokens of an image see each other, "sliding" or "all".
    debug: checks the output of every layer and raises FloatingPointError where a value is not finite. observe: is given
    the inputs of every layer's products (calibration.py).
    """

    matmul: MatmulMode
    embedding_scale: float
    activations: str | None = None
    image_attention: str = "sliding"
    debug: bool = False
    observe: Callable[[LayerInputs], None] | None = None


def forward(
    config: ModelConfig,
    weights: ModelWeights,
    options: ForwardOptions,
    cache: Cache,
    canvases: Canvases | None,
    chunks: Sequence[PrefillChunk] = (),
) -> Tensor | None:
    """Returns the normalised output of the last layer for the rows of the canvases, [B, L, hidden], or None without
    canvases. Appends each chunk to its slot of the cache; no two chunks share a slot.
    """
    epsilon = config.rms_norm_eps
    rows = Rows.describe(canvases, chunks, cache, config, weights.embed_tokens.dtype)
    hidden = embed(rows, weights, options, epsilon)
    normed = rms_norm(hidden, weights.layers[0].input_layernorm, epsilon)
    for layer, layer_weights in zip(config.layers, weights.layers, strict=True):
        last = layer.index == len(config.layers) - 1
        if last and rows.chunks:
            # In the last layer nothing reads a chunk's output, so only its keys and values are computed.
            _store_chunks(rows, normed, layer, layer_weights, options, epsilon, cache)
            if canvases is None:
                break
            rows = rows.canvases_alone()
            hidden, normed = hidden[: rows.canvas_rows], normed[: rows.canvas_rows]
        next_norm = weights.norm if last else weights.layers[layer.index + 1].input_layernorm
        hidden, normed = decoder_layer(hidden, normed, rows, layer, layer_weights, next_norm, config, options, cache)
        if options.debug and not bool(torch.isfinite(hidden).all()):
            raise FloatingPointError(f"the output of layer {layer.index} is not finite")
    for chunk in chunks:
        cache.advance(chunk.slot, len(chunk))
    return None if canvases is None else normed.unflatten(0, canvases.ids.shape)


def embed(rows: Rows, weights: ModelWeights, options: ForwardOptions, epsilon: float) -> Tensor:
    """The input of the first layer, [rows, hidden].

    The input of a canvas token is its embedding plus the self-conditioning, normalised; that of a token of a chunk is
    its embedding, or an image's features as they are.
    """
    parts = []
    if rows.canvases is not None:
        ids, soft_embedding = rows.canvases.ids, rows.canvases.soft_embedding
        hidden = functional.embedding(ids.reshape(-1), weights.embed_tokens) * options.embedding_scale
        if soft_embedding is not None:
            alone = rows.canvases_alone()
            matmul = Matmul(options.matmul, alone.counts, alone.starts, alone.side(None))
            hidden = hidden + matmul.gated_mlp(
                rms_norm(soft_embedding.flatten(0, 1), weights.self_conditioning_pre_norm, epsilon),
                weights.self_conditioning_gate_proj,
                weights.self_conditioning_up_proj,
                weights.self_conditioning_down_proj,
                prefix="self_conditioning_",
            )
        parts.append(rms_norm(hidden, None, epsilon))
    for chunk in rows.chunks:
        hidden = functional.embedding(chunk.ids, weights.embed_tokens) * options.embedding_scale
        for offset, features in chunk.features:
            hidden[offset : offset + len(features)] = features
        parts.append(hidden)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def decoder_layer(
    hidden: Tensor,
    normed: Tensor,
    rows: Rows,
    layer: LayerConfig,
    weights: LayerWeights,
    next_norm: Tensor,
    config: ModelConfig,
    options: ForwardOptions,
    cache: Cache,
) -> tuple[Tensor, Tensor]:
    """One layer on hidden [n, hidden] and `normed`, its first norm. Returns the output and its norm by `next_norm`."""
    epsilon = config.rms_norm_eps
    matmul = Matmul(options.matmul, rows.counts, rows.starts, rows.side(layer.index))

    query, key, value = project_qkv(normed, weights, layer, rows.rotary[layer.rope, layer.head_dim], epsilon, matmul)
    batch_invariant = options.matmul is not MatmulMode.BATCHED
    attended = _attention(query, key, value, rows, layer, cache, batch_invariant)
    residual, mlp_input, experts_input = attention_residual(
        hidden,
        matmul.linear(attended.flatten(-2), weights.o_proj, "o_proj"),
        weights.post_attention_layernorm,
        weights.pre_feedforward_layernorm,
        weights.pre_feedforward_layernorm_2,
        epsilon,
    )

    router = (weights.router_scale, weights.router_proj, weights.router_per_expert_scale)
    expert_ids, expert_weights = matmul.route(residual, *router, config.top_k_experts, epsilon)
    if rows.skipped is not None:
        expert_ids.masked_fill_(rows.skipped, -1)
    if options.observe is not None:
        inputs = (normed, attended.flatten(-2), mlp_input, experts_input, expert_ids)
        options.observe(LayerInputs(layer.index, weights, *inputs))
    mlp_output = matmul.gated_mlp(mlp_input, weights.gate_proj, weights.up_proj, weights.down_proj)
    moe_output = matmul.experts(
        experts_input, expert_ids, expert_weights, weights.experts_gate_up, weights.experts_down, options.activations
    )

    norms = (
        weights.post_feedforward_layernorm_1,
        weights.post_feedforward_layernorm_2,
        weights.post_feedforward_layernorm,
        next_norm,
    )
    # Rows of canvases use the decoder's layer scalar, rows of chunks the encoder's.
    outputs = []
    for part, scalar in (
        (slice(rows.canvas_rows), weights.decoder_layer_scalar),
        (slice(rows.canvas_rows, None), weights.encoder_layer_scalar),
    ):
        if residual[part].shape[0]:
            outputs.append(layer_output(residual[part], mlp_output[part], moe_output[part], *norms, scalar, epsilon))
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat([output for output, _ in outputs]), torch.cat([next_normed for _, next_normed in outputs])


def _attention(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, layer: LayerConfig, cache: Cache, batch_invariant: bool
) -> Tensor:
    """Attention of all rows [n, heads, head_dim]; appends the keys and values of chunks to the cache."""
    cached, window = (cache.keys[layer.index], cache.values[layer.index]), layer.sliding_window
    parts = []
    for chunk, slot, start, where in zip(
        rows.chunks, rows.chunk_slot, rows.chunk_start, rows.chunk_slices(), strict=True
    ):
        new = (key[None, where], value[None, where])
        spans = chunk.sliding_spans if layer.is_sliding else chunk.full_spans
        attended = causal_attention(query[None, where], *new, *cached, slot, start, spans=spans, window=window)
        append_to_cache(*new, *cached, slot, start)
        parts.append(attended[0])
    if rows.canvases is not None:
        # This comes after the chunks, because a canvas sees the chunks of the same pass.
        canvases = rows.canvases
        first, shape = slice(rows.canvas_rows), canvases.ids.shape
        attended = canvas_attention(
            query[first].unflatten(0, shape),
            key[first].unflatten(0, shape),
            value[first].unflatten(0, shape),
            *cached,
            slot=canvases.slot,
            prefix_length=canvases.prefix_length,
            window=window,
            batch_invariant=batch_invariant,
            out=None if canvases.attention_out is None else canvases.attention_out[layer.head_dim],
        )
        parts.insert(0, attended.flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _store_chunks(
    rows: Rows,
    normed: Tensor,
    layer: LayerConfig,
    weights: LayerWeights,
    options: ForwardOptions,
    epsilon: float,
    cache: Cache,
) -> None:
    """Appends a layer's keys and values of all chunks to the cache, without attention."""
    cosine, sine = rows.rotary[layer.rope, layer.head_dim]
    cached = (cache.keys[layer.index], cache.values[layer.index])
    for chunk, slot, start, position, where in zip(
        rows.chunks, rows.chunk_slot, rows.chunk_start, rows.positions, rows.chunk_slices(), strict=True
    ):
        table, side = (cosine[where], sine[where]), chunk.side(layer.index)
        matmul = Matmul(options.matmul, (len(chunk),), (position,), side)
        _, key, value = project_qkv(normed[where], weights, layer, table, epsilon, matmul)
        append_to_cache(key[None], value[None], *cached, slot, start)
