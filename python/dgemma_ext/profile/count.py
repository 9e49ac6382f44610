"""Counts the bytes and FLOPs of a denoising step or an encode pass, from its configuration and weight sizes.

Bytes: every operator's inputs and outputs once, with only the experts that are hit, the visible rows of the cache, and
the vocabulary tiles that the soft embedding must not skip. FLOPs: two for each multiply and add of a matrix product or
of attention; norms, softmax and sampling count none. A batch reads weights once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from dgemma_ext.checkpoint import LayerConfig, ModelConfig, Weight, layer_layout, model_layout
from dgemma_ext.model import ModelWeights
from dgemma_ext.ops.denoise import VOCABULARY_TILE
from dgemma_ext.ops.formats import Fp8Weight, Int8Weight
from dgemma_ext.profile.parts import Part

# The kind of product in the model's dtype, as `dgemma profile --json` names it; the others are "fp8"
# and "int8".
PLAIN = "plain"


@dataclass(frozen=True)
class WeightSize:
    """The bytes of a weight's values and scales. `product`: the kind of product that it is used in."""

    nbytes: int
    product: str = PLAIN


# (attribute of LayerWeights or ModelWeights, layer or None) → the weight's size.
WeightSizes = Mapping[tuple[str, int | None], WeightSize]


def sizes_of(weights: ModelWeights) -> dict[tuple[str, int | None], WeightSize]:
    """The size of every weight of a loaded model."""
    return {
        # Products of fp8 weights can run in 8 bits, those of int8 always do; other weights are decoded.
        (attribute, layer): WeightSize(
            weight.nbytes, weight.name if isinstance(weight, Fp8Weight | Int8Weight) else PLAIN
        )
        for layer, attributes in weights_by_layer(weights)
        for attribute, weight in attributes.items()
    }


def weights_by_layer(weights: ModelWeights) -> Iterator[tuple[int | None, dict[str, Weight]]]:
    """The model's own weights under None, then each layer's: tensors and quantized weights by attribute."""
    numbered: list[tuple[int | None, object]] = [(None, weights), *enumerate(weights.layers)]
    for layer, record in numbered:
        named = {name: value for name, value in vars(record).items() if hasattr(value, "nbytes")}
        yield layer, named


@dataclass(frozen=True)
class Work:
    """Bytes and FLOPs of an operator. `product`: the kind of product ("plain", "fp8", "int8") that limits the FLOPs."""

    bytes: float = 0.0
    flops: float = 0.0
    product: str = PLAIN


@dataclass(frozen=True)
class Operation:
    """One operator of a step. `name`: the weight that it multiplies by (attribute), else the operator's own."""

    part: Part
    name: str
    layer: int | None
    work: Work


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step: requests, positions that each has in the cache, canvas, and experts hit in each layer."""

    batch: int
    prefix: int
    canvas: int
    experts_hit: tuple[float, ...]
    # Vocabulary tiles that the soft embedding must not skip: the mean for a row, and those of all rows together. None
    # means all.
    soft_tiles: tuple[float, float] | None = None
    # A GPU's head kernel computes the statistics too, so they read no logits from memory.
    statistics_in_head: bool = False


def expected_experts_hit(config: ModelConfig, tokens: int) -> float:
    """The expected number of a layer's experts that `tokens` hit, when every choice of top_k is equally likely."""
    return config.num_experts * (1.0 - (1.0 - config.top_k_experts / config.num_experts) ** tokens)


class _Counter:
    """Makes the operations over `tokens` rows of hidden states."""

    def __init__(self, config: ModelConfig, weights: WeightSizes, tokens: int, dtype: torch.dtype) -> None:
        self.config = config
        self.weights = weights
        self.tokens = tokens
        self.itemsize = dtype.itemsize
        self._shapes: dict[tuple[str, int | None], tuple[int, ...]] = {
            (attribute, None): shape for attribute, (_, shape) in model_layout(config).items()
        }
        for layer in config.layers:
            for attribute, (_, shape) in layer_layout(config, layer).items():
                self._shapes[attribute, layer.index] = shape

    def weight_bytes(self, attribute: str, layer: int | None) -> int:
        return self.weights[attribute, layer].nbytes

    def rows(self, *widths: int) -> float:
        """Bytes of activations of these widths for all tokens."""
        return float(self.tokens * sum(widths) * self.itemsize)

    def linear(self, part: Part, attribute: str, layer: int | None) -> Operation:
        """x @ weight.T over all tokens."""
        rows, columns = self._shapes[attribute, layer]
        moved = self.weight_bytes(attribute, layer) + self.rows(columns, rows)
        product = self.weights[attribute, layer].product
        return Operation(part, attribute, layer, Work(moved, 2.0 * self.tokens * rows * columns, product))

    def gated_mlp(self, part: Part, prefix: str, layer: int | None) -> Iterator[Operation]:
        width = self.config.intermediate_size
        yield self.linear(part, f"{prefix}gate_proj", layer)
        yield self.linear(part, f"{prefix}up_proj", layer)
        yield Operation(part, "gelu_product", layer, Work(self.rows(3 * width)))
        yield self.linear(part, f"{prefix}down_proj", layer)

    def input_norms(self) -> Operation:
        """The norm of the soft embedding, and the norm of its sum with the token embeddings."""
        hidden = self.config.hidden_size
        moved = self.rows(2 * hidden, 3 * hidden) + self.weight_bytes("self_conditioning_pre_norm", None)
        return Operation(Part.EMBEDDING, "input_norms", None, Work(moved))

    def first_norm(self) -> Operation:
        """The first layer's first norm; those of the other layers are part of the layer before."""
        hidden = self.config.hidden_size
        moved = self.rows(2 * hidden) + self.weight_bytes("input_layernorm", 0)
        return Operation(Part.NORMS, "input_layernorm", 0, Work(moved))

    def projections(self, layer: LayerConfig, positions: int) -> Iterator[Operation]:
        """Queries, keys and values, normalised and rotated; rotary tables of `positions`."""
        index, width = layer.index, layer.head_dim
        queries, keys = self.config.num_attention_heads * width, layer.num_key_value_heads * width
        names = ("q_proj", "k_proj") if layer.k_eq_v else ("q_proj", "k_proj", "v_proj")
        for name in names:
            yield self.linear(Part.PROJECTIONS, name, index)
        norms = self.weight_bytes("q_norm", index) + self.weight_bytes("k_norm", index)
        tables = 2 * positions * width * self.itemsize
        moved = self.rows(queries, keys * (len(names) - 1)) + self.rows(queries, 2 * keys)
        yield Operation(Part.NORMS, "normalise_heads", index, Work(moved + norms + tables))

    def after_attention(self, layer: LayerConfig, experts_hit: float) -> Iterator[Operation]:
        """The operators after a layer's attention, up to its output and the next layer's first norm."""
        config, index, hidden = self.config, layer.index, self.config.hidden_size
        norm = hidden * self.itemsize
        yield self.linear(Part.PROJECTIONS, "o_proj", index)
        yield Operation(Part.NORMS, "attention_residual", index, Work(self.rows(5 * hidden) + 3 * norm))
        yield self._router(index)
        yield from self.gated_mlp(Part.MLP, "", index)
        share = experts_hit / config.num_experts
        stored = self.weight_bytes("experts_gate_up", index) + self.weight_bytes("experts_down", index)
        choice = self.tokens * config.top_k_experts * 8  # an int32 and a float32 for each slot
        flops = 2.0 * self.tokens * config.top_k_experts * 3 * hidden * config.moe_intermediate_size
        product = self.weights["experts_gate_up", index].product
        work = Work(stored * share + choice + self.rows(2 * hidden), flops, product)
        yield Operation(Part.EXPERTS, "moe_ffn", index, work)
        yield Operation(Part.NORMS, "layer_output", index, Work(self.rows(5 * hidden) + 4 * norm))

    def _router(self, index: int) -> Operation:
        config = self.config
        names = ("router_proj", "router_scale", "router_per_expert_scale")
        choice = self.tokens * config.top_k_experts * 8
        moved = sum(self.weight_bytes(name, index) for name in names) + choice + self.rows(config.hidden_size)
        flops = 2.0 * self.tokens * config.hidden_size * config.num_experts
        return Operation(Part.ROUTER, "route", index, Work(moved, flops))


def step_operations(config: ModelConfig, weights: WeightSizes, dtype: torch.dtype, shape: StepShape) -> list[Operation]:
    """The operators of one denoising step with self-conditioning. Raises ValueError for a wrong number of layers."""
    if len(shape.experts_hit) != len(config.layers):
        raise ValueError(f"experts_hit must have {len(config.layers)} numbers, got {len(shape.experts_hit)}")
    tokens = shape.batch * shape.canvas
    counter = _Counter(config, weights, tokens, dtype)
    hidden = config.hidden_size
    found = [
        # The embedding rows, and the token ids.
        Operation(Part.EMBEDDING, "embedding", None, Work(counter.rows(2 * hidden) + 4 * tokens)),
        *counter.gated_mlp(Part.EMBEDDING, "self_conditioning_", None),
        counter.input_norms(),
        counter.first_norm(),
    ]
    for layer, hit in zip(config.layers, shape.experts_hit, strict=True):
        width, heads = layer.head_dim, config.num_attention_heads
        prefix = min(shape.prefix, layer.sliding_window - 1) if layer.is_sliding else shape.prefix
        cached = 2 * shape.batch * prefix * layer.num_key_value_heads * width * dtype.itemsize
        moved = cached + counter.rows(2 * heads * width, 2 * layer.num_key_value_heads * width)
        flops = 4.0 * tokens * heads * width * (prefix + shape.canvas)
        found += counter.projections(layer, shape.canvas)
        found.append(Operation(_attention(layer), "canvas_attention", layer.index, Work(moved, flops)))
        found += counter.after_attention(layer, hit)
    return found + list(_after_layers(counter, shape))


def _after_layers(counter: _Counter, shape: StepShape) -> Iterator[Operation]:
    config, tokens = counter.config, counter.tokens
    table = counter.weight_bytes("embed_tokens", None)
    logits, rows = counter.rows(config.vocab_size), counter.rows(config.hidden_size)
    flops = 2.0 * tokens * config.vocab_size * config.hidden_size
    # A maximum and a sum in float32 for every tile of the vocabulary.
    tiles = tokens * 8.0 * -(-config.vocab_size // VOCABULARY_TILE)
    yield Operation(Part.HEAD, "vocabulary_head", None, Work(table + rows + logits, flops))
    statistics = tiles + (0.0 if shape.statistics_in_head else logits)
    yield Operation(Part.SAMPLING, "vocabulary_statistics", None, Work(statistics))
    # The tiles' statistics, and one tile of logits for each position.
    chosen = counter.rows(min(VOCABULARY_TILE, config.vocab_size))
    yield Operation(Part.SAMPLING, "sample", None, Work(tiles + chosen))
    # Three tokens and an entropy are read; a token, a draft and a flag are written.
    yield Operation(Part.SAMPLING, "update_canvas_", None, Work(tokens * (4 * 4 + 4 + 4 + 1)))
    of_vocabulary = -(-config.vocab_size // VOCABULARY_TILE)
    row_share, all_share = (1.0, 1.0) if shape.soft_tiles is None else (n / of_vocabulary for n in shape.soft_tiles)
    soft = Work(table * all_share + logits * row_share + tiles + rows, flops * row_share)
    yield Operation(Part.SOFT_EMBEDDING, "soft_embedding", None, soft)


def encode_operations(
    config: ModelConfig, weights: WeightSizes, dtype: torch.dtype, tokens: int, experts_hit: Sequence[float]
) -> list[Operation]:
    """The operators of encoding `tokens` into an empty cache; the last layer computes only keys and values.

    Raises ValueError for a wrong number of layers.
    """
    if len(experts_hit) != len(config.layers):
        raise ValueError(f"experts_hit must have {len(config.layers)} numbers, got {len(experts_hit)}")
    counter = _Counter(config, weights, tokens, dtype)
    moved = counter.rows(2 * config.hidden_size) + 4 * tokens
    found = [Operation(Part.EMBEDDING, "embedding", None, Work(moved)), counter.first_norm()]
    for layer, hit in zip(config.layers, experts_hit, strict=True):
        width, heads, keys = layer.head_dim, config.num_attention_heads, layer.num_key_value_heads
        found += counter.projections(layer, tokens)
        stored = min(tokens, layer.sliding_window - 1) if layer.is_sliding else tokens
        appended = Work(2.0 * 2 * stored * keys * width * dtype.itemsize)
        if layer.index < len(config.layers) - 1:
            pairs = _causal_pairs(tokens, layer.sliding_window if layer.is_sliding else tokens)
            work = Work(counter.rows(2 * heads * width, 2 * keys * width), 4.0 * heads * width * pairs)
            found.append(Operation(_attention(layer), "causal_attention", layer.index, work))
        found.append(Operation(_attention(layer), "append_to_cache", layer.index, appended))
        if layer.index < len(config.layers) - 1:
            found += counter.after_attention(layer, hit)
    return found


def _causal_pairs(tokens: int, window: int) -> int:
    """Pairs of query and visible key: each query sees itself and up to window - 1 positions before it."""
    first = min(tokens, window)
    return first * (first + 1) // 2 + (tokens - first) * window


def _attention(layer: LayerConfig) -> Part:
    return Part.SLIDING if layer.is_sliding else Part.FULL


def total(operations: Iterable[Operation]) -> tuple[float, dict[str, float]]:
    """Bytes, and FLOPs by kind of product."""
    moved, flops = 0.0, dict[str, float]()
    for operation in operations:
        moved += operation.work.bytes
        flops[operation.work.product] = flops.get(operation.work.product, 0.0) + operation.work.flops
    return moved, flops
