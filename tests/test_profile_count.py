"""The counts of a profile: bytes and FLOPs against the tensors of each operator, and against torch's counter."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dgemma_ext as dg
from dgemma_ext.checkpoint import ModelConfig, layer_layout, model_layout
from dgemma_ext.ops.plain import block_attention as block_attention_plain
from dgemma_ext.ops.plain import denoise as denoise_plain
from dgemma_ext.ops.plain import grouped_gemm as grouped_gemm_plain
from dgemma_ext.ops.plain import router as router_plain
from dgemma_ext.ops.plain import vocabulary_head as vocabulary_head_plain
from dgemma_ext.profile.count import (
    StepShape,
    WeightSize,
    encode_operations,
    expected_experts_hit,
    sizes_of,
    step_operations,
    total,
    weights_by_layer,
)
from dgemma_ext.profile.recorder import experts_hit
from dgemma_ext.profile.soft_tiles import soft_tiles
from dgemma_ext.profile.true_size import true_config
from profiles import PREFIX, model
from published_layout import published_shapes

WEIGHTS = ["auto", "fp8", "int4", "nvfp4"]
SELF_CONDITIONING = [f"self_conditioning_{name}_proj" for name in ("gate", "up", "down")]


class Meter(TorchDispatchMode):
    """Records the bytes of the arguments and results of every operator call, by operator and weight."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.names = {
            (weight if isinstance(weight, Tensor) else weight.values).data_ptr(): (attribute, layer)
            for layer, attributes in weights_by_layer(weights)
            for attribute, weight in attributes.items()
        }
        self.bytes: dict[tuple[str, int | None], list[float]] = defaultdict(list)
        self.arguments: dict[str, list[tuple[Any, ...]]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        given = [t for t in args if isinstance(t, Tensor)]
        if func._schema.name.startswith("dgemma::") or name == "mm":
            self.arguments[name].append(args)
            back = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]
            key = next((self.names[t.data_ptr()] for t in given if t.data_ptr() in self.names), (name, None))
            self.bytes[(key[0] if name in ("mm", "dense_quantized") else name), key[1]].append(
                float(sum(t.nbytes for t in (*given, *back)))
            )
        return result


@cache
def metered(weights: str = "auto") -> Meter:
    """A step as the profile runs it."""
    watched = model(weights)
    scheduler = dg.Scheduler(watched, max_batch=1, max_length=PREFIX)
    sampler = dg.SamplerConfig(confidence_threshold=0.0)
    ids = torch.randint(0, watched.config.vocab_size, (1, PREFIX), generator=torch.Generator().manual_seed(0))
    scheduler.submit(ids[0].tolist(), max_new_tokens=8, sampler=sampler, seed=0)
    scheduler.step()
    scheduler.step()
    meter = Meter(watched.weights)
    with meter:
        scheduler.step()
    return meter


def operations(weights: str = "auto", **changes: Any) -> dict[tuple[str, int | None], Any]:
    watched = model(weights)
    experts = watched.config.num_experts
    sizes: dict[str, Any] = {
        "batch": 1,
        "prefix": PREFIX,
        "canvas": watched.config.canvas_length,
        "experts_hit": (float(experts),) * len(watched.config.layers),
        **changes,
    }
    found = step_operations(watched.config, sizes_of(watched.weights), watched.dtype, StepShape(**sizes))
    assert len({(operation.name, operation.layer) for operation in found}) == len(found)
    return {(operation.name, operation.layer): operation for operation in found}


# Bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bytes_are_those_of_the_tensors_that_operators_are_given(weights: str) -> None:
    """For operators that read all of their arguments: not attention, experts, statistics and those after."""
    counted, seen = operations(weights), metered(weights).bytes
    whole = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "route", "normalise_heads"}
    whole |= {"attention_residual", "layer_output", "gelu_product", *SELF_CONDITIONING}
    compared = 0
    for (name, layer), operation in counted.items():
        if name not in whole:
            continue
        # A GELU has no weight that gives its layer: the first is the self-conditioning's.
        calls = seen[name, layer] if name != "gelu_product" else seen[name, None][:1]
        assert calls == [operation.work.bytes], (name, layer)
        compared += 1
    # Three layers, the full one without a value projection; the self-conditioning's three products and its GELU.
    assert compared == 3 * 12 - 1 + 4


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bytes_of_experts_are_of_those_that_are_hit(weights: str) -> None:
    watched, meter = model(weights), metered(weights)
    name = "moe_ffn" if weights == "auto" else "moe_ffn_quantized"
    for index, (layer, given) in enumerate(zip(watched.weights.layers, meter.arguments[name], strict=True)):
        hit = {int(i) for i in given[1].flatten()}
        assert experts_hit([given[1]]) == len(hit)
        both = (layer.experts_gate_up, layer.experts_down)
        kept = sum((w[e] if isinstance(w, Tensor) else w.expert(e)).nbytes for w in both for e in hit)
        others = 2 * given[0].nbytes + given[1].nbytes + given[2].nbytes
        counted = operations(weights, experts_hit=(float(len(hit)),) * 3)["moe_ffn", index]
        assert counted.work.bytes == pytest.approx(kept + others)


def test_bytes_of_attention_are_of_visible_rows() -> None:
    """The sliding layers' window is 16: 15 rows of the prefix are visible, and all 40 in the full layer."""
    counted, meter = operations(), metered()
    for index, given in enumerate(meter.arguments["canvas_attention"]):
        query, key, value, cached_key, cached_value = given[:5]
        # The slots are as long as the prefix, so that all rows of the ring are visible.
        assert cached_key.shape[1] == (40 if index == 2 else 15)
        wanted = 2 * query.nbytes + key.nbytes + value.nbytes + cached_key.nbytes + cached_value.nbytes
        assert counted["canvas_attention", index].work.bytes == wanted
    short = operations(prefix=3)
    row = 2 * 2 * 16 * 2  # keys and values of two heads of 16 in two bytes
    difference = counted["canvas_attention", 0].work.bytes - short["canvas_attention", 0].work.bytes
    assert difference == (15 - 3) * row


def test_bytes_after_the_layers() -> None:
    counted, config = operations(), model().config
    tokens, vocabulary, hidden = 8, config.vocab_size, config.hidden_size
    table, logits, rows = 2 * vocabulary * hidden, 2 * tokens * vocabulary, 2 * tokens * hidden
    tiles = 8 * tokens * 4  # four tiles of 128 in a vocabulary of 512
    assert counted["vocabulary_head", None].work.bytes == table + logits + rows
    assert counted["vocabulary_statistics", None].work.bytes == logits + tiles
    assert operations(statistics_in_head=True)["vocabulary_statistics", None].work.bytes == tiles
    assert counted["soft_embedding", None].work.bytes == table + logits + tiles + rows
    sparse = operations(soft_tiles=(1.0, 2.0))["soft_embedding", None].work
    assert sparse.bytes == table / 2 + logits / 4 + tiles + rows
    assert sparse.flops == counted["soft_embedding", None].work.flops / 4


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_weight_is_counted_once(weights: str) -> None:
    """Without any token only the weights remain: all that are loaded, the embedding for the head and again for the soft
    embedding."""
    watched = model(weights)
    loaded = sum(w.nbytes for _, attributes in weights_by_layer(watched.weights) for w in attributes.values())
    moved, _ = total(operations(weights, batch=0, canvas=0).values())
    assert moved == loaded + watched.weights.embed_tokens.nbytes


def test_weights_of_the_published_model() -> None:
    config = true_config()
    shapes = {name: shape for name, shape in published_shapes().items() if name.startswith("model.decoder.")}
    scalars = sum(name.endswith("layer_scalar") for name in shapes)
    weights = {key: WeightSize(2 * math.prod(shape)) for key, shape in layout_shapes(config).items()}
    nothing = StepShape(0, 0, 0, (128.0,) * 30)
    moved, flops = total(step_operations(config, weights, torch.bfloat16, nothing))
    stored = 2 * (sum(math.prod(shape) for shape in shapes.values()) - scalars)
    assert moved == stored + 2 * 262_144 * 2816
    assert sum(flops.values()) == 0
    # 84 of 128 experts: 22.84 billion parameters of experts, two bytes each.
    fewer, _ = total(step_operations(config, weights, torch.bfloat16, StepShape(0, 0, 0, (84.0,) * 30)))
    assert moved - fewer == 30 * 44 * 3 * 2816 * 704 * 2


def layout_shapes(config: ModelConfig) -> dict[tuple[str, int | None], tuple[int, ...]]:
    shapes = {
        (name, layer.index): shape
        for layer in config.layers
        for name, (_, shape) in layer_layout(config, layer).items()
    }
    return {**shapes, **{(name, None): shape for name, (_, shape) in model_layout(config).items()}}


def test_a_batch_reads_weights_once() -> None:
    one, four = operations(), operations(batch=4)
    weight = model().weights.layers[1].q_proj
    assert four["q_proj", 1].work.bytes == 4 * one["q_proj", 1].work.bytes - 3 * weight.nbytes
    assert four["canvas_attention", 2].work.bytes == 4 * one["canvas_attention", 2].work.bytes


# FLOPs ------------------------------------------------------------------------------------------------------------


def flops_of(run: Any, *arguments: Any) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        run(*arguments)
    return float(counter.get_total_flops())


def test_flops_are_those_that_torch_counts_in_the_plain_forms() -> None:
    counted, meter = operations(), metered()
    for index in range(3):
        attention = meter.arguments["canvas_attention"][index]
        assert counted["canvas_attention", index].work.flops == flops_of(
            block_attention_plain.canvas_attention, *attention
        )
        experts = meter.arguments["moe_ffn"][index]
        assert counted["moe_ffn", index].work.flops == flops_of(grouped_gemm_plain.moe_ffn, *experts)
        assert counted["route", index].work.flops == flops_of(router_plain.route, *meter.arguments["route"][index])
    assert counted["vocabulary_head", None].work.flops == flops_of(
        vocabulary_head_plain.vocabulary_head, *meter.arguments["vocabulary_head"][0]
    )
    assert counted["soft_embedding", None].work.flops == flops_of(
        denoise_plain.soft_embedding, *meter.arguments["soft_embedding"][0]
    )
    products = sum(2.0 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in meter.arguments["mm"])
    dense = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    names = {*dense, *SELF_CONDITIONING}
    assert products == sum(operation.work.flops for (name, _), operation in counted.items() if name in names)


def test_flops_of_an_encode_are_of_the_pairs_that_see_each_other() -> None:
    watched = model()
    cache = watched.new_cache(1, PREFIX)
    seen: list[tuple[Any, ...]] = []
    plain = block_attention_plain.causal_attention

    class RecordAttention(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name == "dgemma::causal_attention":
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with RecordAttention():
        watched.encode(torch.arange(5, 5 + PREFIX)[None], cache)
    hits = [float(watched.config.num_experts)] * 3
    found = encode_operations(watched.config, sizes_of(watched.weights), watched.dtype, PREFIX, hits)
    counted = {(operation.name, operation.layer): operation.work for operation in found}
    assert len(seen) == 2, "of the last layer only keys and values are made"
    for index, given in enumerate(seen):
        # The pairs, from the masks of the torch form: all values but one are zero, so a row shows what it sees.
        query, key, value = (torch.zeros_like(t, dtype=torch.float32) for t in given[:3])
        pairs = 0
        for position in range(PREFIX):
            value.zero_()[0, position] = 1.0
            rest = (*(t.float() for t in given[3:5]), given[5], torch.zeros_like(given[6]), *given[7:])
            pairs += int((plain(query, key, value, *rest)[0, :, 0, 0] > 0).sum())
        assert counted["causal_attention", index].flops == 4 * 4 * 16 * pairs
    names = {name for name, _ in counted}
    assert {name for name, layer in counted if layer == 2} == {"q_proj", "k_proj", "normalise_heads", "append_to_cache"}
    assert "vocabulary_head" not in names


def test_expected_experts_are_those_of_random_choices() -> None:
    config, generator = true_config(layers=1), random.Random(1)
    for tokens in (1, 4, 32):
        draws = [
            len({e for _ in range(tokens) for e in generator.sample(range(config.num_experts), 8)}) for _ in range(400)
        ]
        assert expected_experts_hit(config, tokens) == pytest.approx(sum(draws) / len(draws), rel=0.02)
    assert expected_experts_hit(config, 256) > 127.99


def test_tiles_that_must_not_be_skipped() -> None:
    """Two rows over four tiles: in the first one tile has nearly all mass, in the second three have some."""
    probabilities = torch.tensor([[[0.9990, 0.0006, 0.0004, 0.0], [0.5, 0.25, 0.0, 0.25]]])
    named = {
        "tile_sum": probabilities,
        "tile_max": torch.zeros(1, 2, 4),
        "row_max": torch.zeros(1, 2),
        "row_sum": probabilities.double().sum(-1),
        "embedding_scale": 2.0,
        "max_embedding_norm": 1.0,
        "tolerance": 0.01,
    }
    result = torch.ones(1, 2, 4)  # the norm is 1 before the scale of 2, so 0.01 may be skipped
    # A GPU's kernels skip two: bounds with a margin of 1.02, and a quarter of 0.01 for all together.
    assert soft_tiles([(named, result)]) == (2.0, 3.0, 3.0)
    assert soft_tiles([(named | {"tolerance": 0.0}, result)]) == (3.0, 4.0, 4.0)
    pinned = {"pinned": torch.tensor([[False, True]])}
    assert soft_tiles([(named | pinned, result * torch.tensor([1.0, 0.0])[:, None])]) == (0.5, 1.0, 1.0)
    # Two calls: the mean over all rows, and the tiles that either needs.
    other = named | {"tile_sum": probabilities[:, :1], "row_sum": probabilities[:, :1].double().sum(-1)}
    other |= {"tile_max": torch.zeros(1, 1, 4), "row_max": torch.zeros(1, 1)}
    assert soft_tiles([(other, result[:, :1])]) == (1.0, 1.0, 1.0)
    assert soft_tiles([(named, result), (other, result[:, :1])]) == (pytest.approx(5 / 3), 3.0, 2.0)
