"""The profile of a step: what is counted against other counts, what is timed, and that looking on changes nothing."""

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
from checkpoints import PUBLISHED_CONFIG, published_shapes
from command import random_checkpoint
from dgemma_ext.config import ModelConfig
from dgemma_ext.ops import block_attention_plain, denoise_plain, grouped_gemm_plain, router, vocabulary_head
from dgemma_ext.profile import Profile, profile
from dgemma_ext.profile.count import (
    PLAIN,
    Format,
    StepShape,
    encode_operations,
    expected_experts_hit,
    formats_of,
    step_operations,
    total,
    weights_by_layer,
)
from dgemma_ext.profile.kernels import events_of, slices_on_gpu
from dgemma_ext.profile.machine import Machine
from dgemma_ext.profile.parts import Part
from dgemma_ext.profile.recorder import RANGE, Call, Recorder, experts_hit, soft_tiles
from dgemma_ext.profile.true_size import random_model, true_config

PREFIX, STEPS = 40, 3
WEIGHTS = ["stored", "fp8", "int4", "nvfp4"]

# Which operators of a step each part has, written from modeling_diffusion_gemma.py and not from the package's table.
# Sums, conversions and norms in torch's operators are left out.
OPERATORS = {
    Part.EMBEDDING: {"embedding", "gelu_product"}
    | {f"self_conditioning_{name}_proj" for name in ("gate", "up", "down")},
    Part.NORMS: {"normalise_heads", "attention_residual", "layer_output"},
    Part.PROJECTIONS: {"q_proj", "k_proj", "v_proj", "o_proj"},
    Part.SLIDING: {"canvas_attention"},
    Part.FULL: {"canvas_attention"},
    Part.ROUTER: {"route"},
    Part.EXPERTS: {"moe_ffn"},
    Part.MLP: {"gate_proj", "up_proj", "gelu_product", "down_proj"},
    Part.HEAD: {"vocabulary_head"},
    Part.SAMPLING: {"vocabulary_statistics", "sample", "update_canvas_"},
    Part.SOFT_EMBEDDING: {"soft_embedding"},
}
IN_TORCH = {"_to_copy", "pow", "mean", "add", "add_", "rsqrt", "mul", "clone", "cat", "copy_", "masked_fill_"}


@cache
def model(weights: str = "stored") -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(random_checkpoint(hidden=128, intermediate=128), weights=weights)


@cache
def profiled(batch: int = 1, weights: str = "stored", batched: bool = False) -> Profile:
    """batched: as on a GPU, where requests share a step."""
    return profile(model(weights), steps=STEPS, prefix=PREFIX, batch=batch, batched=batched)


class Meter(TorchDispatchMode):
    """Bytes that every call of an operator is given and gives back, by its name and the weight that it is given."""

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
def metered(weights: str = "stored") -> Meter:
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


def operations(weights: str = "stored", **changes: Any) -> dict[tuple[str, int | None], Any]:
    watched = model(weights)
    experts = watched.config.num_experts
    sizes: dict[str, Any] = {
        "batch": 1,
        "prefix": PREFIX,
        "canvas": watched.config.canvas_length,
        "experts_hit": (float(experts),) * len(watched.config.layers),
        **changes,
    }
    found = step_operations(watched.config, formats_of(watched.weights), watched.dtype, StepShape(**sizes))
    assert len({(operation.name, operation.layer) for operation in found}) == len(found)
    return {(operation.name, operation.layer): operation for operation in found}


# Bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bytes_are_those_of_the_tensors_that_operators_are_given(weights: str) -> None:
    """Where an operator reads all that it is given: everything but attention, experts, statistics and what follows."""
    counted, seen = operations(weights), metered(weights).bytes
    whole = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "route", "normalise_heads"}
    whole |= {"attention_residual", "layer_output", "gelu_product", *OPERATORS[Part.EMBEDDING]} - {"embedding"}
    compared = 0
    for (name, layer), operation in counted.items():
        if name not in whole:
            continue
        # A GELU has no weight that tells its layer: the first is self-conditioning's.
        calls = seen[name, layer] if name != "gelu_product" else seen[name, None][:1]
        assert calls == [operation.work.bytes], (name, layer)
        compared += 1
    # Three layers, the full one without a projection of values; self-conditioning's three products and its GELU.
    assert compared == 3 * 12 - 1 + 4


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bytes_of_experts_are_of_those_that_are_hit(weights: str) -> None:
    watched, meter = model(weights), metered(weights)
    name = "moe_ffn" if weights == "stored" else "moe_ffn_quantized"
    for index, (layer, given) in enumerate(zip(watched.weights.layers, meter.arguments[name], strict=True)):
        hit = {int(i) for i in given[1].flatten()}
        assert experts_hit([given[1]]) == len(hit)
        both = (layer.experts_gate_up, layer.experts_down)
        kept = sum((w[e] if isinstance(w, Tensor) else w.expert(e)).nbytes for w in both for e in hit)
        others = 2 * given[0].nbytes + given[1].nbytes + given[2].nbytes
        counted = operations(weights, experts_hit=(float(len(hit)),) * 3)["moe_ffn", index]
        assert counted.work.bytes == pytest.approx(kept + others)


def test_bytes_of_attention_are_of_visible_rows() -> None:
    """The sliding layers' window is 16: 15 rows of the prefix are visible, in the full one all 40."""
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
    """With no token at all what is left is the weights: all that are loaded, the embedding for the head and again for
    the soft embedding."""
    watched = model(weights)
    loaded = sum(w.nbytes for _, attributes in weights_by_layer(watched.weights) for w in attributes.values())
    moved, _ = total(operations(weights, batch=0, canvas=0).values())
    assert moved == loaded + watched.weights.embed_tokens.nbytes


def test_weights_of_the_published_model() -> None:
    config = true_config()
    shapes = {name: shape for name, shape in published_shapes().items() if name.startswith("model.decoder.")}
    scalars = sum(name.endswith("layer_scalar") for name in shapes)
    plain = {key: Format(PLAIN) for key in layout_keys(config)}
    nothing = StepShape(0, 0, 0, (128.0,) * 30)
    moved, flops = total(step_operations(config, plain, torch.bfloat16, nothing))
    stored = 2 * (sum(math.prod(shape) for shape in shapes.values()) - scalars)
    assert moved == stored + 2 * 262_144 * 2816
    assert sum(flops.values()) == 0
    # 84 of 128 experts: 22.84 billion parameters of experts, two bytes each.
    fewer, _ = total(step_operations(config, plain, torch.bfloat16, StepShape(0, 0, 0, (84.0,) * 30)))
    assert moved - fewer == 30 * 44 * 3 * 2816 * 704 * 2


def layout_keys(config: ModelConfig) -> list[tuple[str, int | None]]:
    from dgemma_ext.checkpoint import layer_layout, model_layout

    of_layers = [(name, layer.index) for layer in config.layers for name in layer_layout(config, layer)]
    return [*((name, None) for name in model_layout(config)), *of_layers]


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
        assert counted["route", index].work.flops == flops_of(router._plain, *meter.arguments["route"][index])
    assert counted["vocabulary_head", None].work.flops == flops_of(
        vocabulary_head._plain, *meter.arguments["vocabulary_head"][0]
    )
    assert counted["soft_embedding", None].work.flops == flops_of(
        denoise_plain.soft_embedding, *meter.arguments["soft_embedding"][0]
    )
    products = sum(2.0 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in meter.arguments["mm"])
    dense = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    names = {*dense, *(f"self_conditioning_{name}_proj" for name in ("gate", "up", "down"))}
    assert products == sum(operation.work.flops for (name, _), operation in counted.items() if name in names)


def test_flops_of_an_encode_are_of_the_pairs_that_see_each_other() -> None:
    watched = model()
    cache = watched.new_cache(1, PREFIX)
    seen: list[tuple[Any, ...]] = []
    plain = block_attention_plain.causal_attention

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name == "dgemma::causal_attention":
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Look():
        watched.encode(torch.arange(5, 5 + PREFIX)[None], cache)
    hits = [float(watched.config.num_experts)] * 3
    found = encode_operations(watched.config, formats_of(watched.weights), watched.dtype, PREFIX, hits)
    counted = {(operation.name, operation.layer): operation.work for operation in found}
    assert len(seen) == 2, "of the last layer only keys and values are made"
    for index, given in enumerate(seen):
        # The pairs themselves, from the masks of the plain form: zero values but one, so that a row tells what it sees.
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


def test_tiles_that_count() -> None:
    """Two rows over four tiles: of the first one tile holds nearly all, of the second three hold something."""
    masses = torch.tensor([[[0.9990, 0.0006, 0.0004, 0.0], [0.5, 0.25, 0.0, 0.25]]])
    named = {
        "tile_sum": masses,
        "tile_max": torch.zeros(1, 2, 4),
        "row_max": torch.zeros(1, 2),
        "row_sum": masses.double().sum(-1),
        "embedding_scale": 2.0,
        "max_embedding_norm": 1.0,
        "tolerance": 0.01,
    }
    result = torch.ones(1, 2, 4)  # of norm 2, which is 1 before the scale: 0.01 may be left out
    assert soft_tiles([(named, result)]) == (2.0, 3.0)
    assert soft_tiles([(named | {"tolerance": 0.0}, result)]) == (3.0, 4.0)
    # Two calls: the mean over all rows, and together what either touches.
    other = named | {"tile_sum": masses[:, :1], "row_sum": masses[:, :1].double().sum(-1)}
    other |= {"tile_max": torch.zeros(1, 1, 4), "row_max": torch.zeros(1, 1)}
    assert soft_tiles([(other, result[:, :1])]) == (1.0, 1.0)
    assert soft_tiles([(named, result), (other, result[:, :1])]) == (pytest.approx(5 / 3), 3.0)


# Times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_sum_to_the_step(batch: int) -> None:
    found = profiled(batch)
    for one in (found.step, found.encode):
        assert sum(row.seconds for row in one.rows) == pytest.approx(one.seconds, rel=1e-9)
        timed = sum(piece.seconds for piece in one.slices) / one.repeats
        assert one.between == pytest.approx(one.seconds - timed, rel=1e-6, abs=1e-9)
        assert one.between > 0
        assert one.rows[-1].seconds >= one.between
    assert [row.part for row in found.step.rows] == list(Part)
    assert found.step.repeats == STEPS
    assert all(row.seconds > 0 and row.floor is not None and row.floor > 0 for row in found.step.rows[:-1])
    of_encode = {row.part for row in found.encode.rows}
    assert of_encode == set(Part) - {Part.HEAD, Part.SAMPLING, Part.SOFT_EMBEDDING, Part.FULL} | {Part.FULL}


@pytest.mark.parametrize(
    ("batch", "weights", "batched"),
    [(1, "stored", False), (3, "stored", False), (1, "fp8", False), (1, "nvfp4", True), (3, "stored", True)],
)
def test_every_operator_is_of_its_part(batch: int, weights: str, batched: bool) -> None:
    found = profiled(batch, weights, batched)
    names: dict[Part, set[str]] = defaultdict(set)
    for piece in found.step.slices:
        names[piece.part].add(piece.name)
    for part, wanted in OPERATORS.items():
        assert wanted <= names[part], part
        assert names[part] - wanted <= IN_TORCH, part
    everywhere = set().union(*OPERATORS.values())
    assert not names[Part.OTHER] & everywhere
    # Layers: the first two are sliding, the last is full.
    attention = {(piece.part, piece.layer) for piece in found.step.slices if piece.name == "canvas_attention"}
    assert attention == {(Part.SLIDING, 0), (Part.SLIDING, 1), (Part.FULL, 2)}
    # The GELUs of a pass: self-conditioning's, and one of every layer.
    gelus = {(piece.part, piece.layer) for piece in found.step.slices if piece.name == "gelu_product"}
    assert gelus == {(Part.EMBEDDING, None), (Part.MLP, 0), (Part.MLP, 1), (Part.MLP, 2)}


@pytest.mark.parametrize("batched", [False, True])
def test_every_counted_operation_was_seen_and_its_work_is_shared_out(batched: bool) -> None:
    found = profiled(3, batched=batched)
    for one in (found.step, found.encode):
        seen = {(piece.name, piece.layer) for piece in one.slices}
        assert {(op.name, op.layer) for op in one.operations} - seen == (
            {("input_norms", None), ("input_layernorm", 0)} if one is found.step else {("input_layernorm", 0)}
        )
        works = [work for work in map(one.work_of, one.slices) if work is not None]
        moved, flops = total(op for op in one.operations if (op.name, op.layer) in seen)
        assert sum(work[0] for work in works) / one.repeats == pytest.approx(moved)
        assert sum(work[1] for work in works) / one.repeats == pytest.approx(sum(flops.values()))


def test_rows_hold_what_is_counted() -> None:
    found = profiled()
    moved, flops = total(found.step.operations)
    assert sum(row.bytes or 0 for row in found.step.rows) == pytest.approx(moved)
    assert sum(row.flops or 0 for row in found.step.rows) == pytest.approx(sum(flops.values()))
    for row in found.step.rows[:-1]:
        assert row.floor == pytest.approx(
            max((row.bytes or 0) / found.machine.bandwidth, (row.flops or 0) / found.machine.peaks[PLAIN])
        )
    assert len(found.experts_hit) == 3
    assert all(2 <= hit <= 8 for hit in found.experts_hit)


def test_a_floor_takes_each_product_at_its_own_peak() -> None:
    machine = Machine("none", bandwidth=100.0, peaks={PLAIN: 10.0, "fp8": 20.0})
    assert machine.floor(400.0, {PLAIN: 30.0}) == 4.0
    assert machine.floor(200.0, {PLAIN: 30.0}) == 3.0
    assert machine.floor(0.0, {PLAIN: 30.0, "fp8": 30.0}) == 4.5
    assert Machine("none", 100.0, {PLAIN: 10.0}).floor(0.0, {"fp8": 30.0}) == 3.0


def test_a_batched_step_counts_the_same() -> None:
    """Three requests in a batch of four rows: the fourth hits no expert and needs no tile."""
    alone, together = profiled(3), profiled(3, batched=True)
    assert together.experts_hit == alone.experts_hit
    assert together.soft_tiles == alone.soft_tiles
    assert [row.bytes for row in together.step.rows] == [row.bytes for row in alone.step.rows]
    of_experts = [sum(piece.name == "moe_ffn" for piece in found.step.slices) for found in (alone, together)]
    assert of_experts == [3 * 3 * STEPS, 3 * STEPS]


@pytest.mark.parametrize("batch", [1, 2])
def test_looking_on_changes_no_token(batch: int) -> None:
    watched = model()
    scheduler = dg.Scheduler(watched, max_batch=batch, max_length=PREFIX)
    sampler = dg.SamplerConfig(confidence_threshold=0.0)
    ids = torch.randint(0, watched.config.vocab_size, (batch, PREFIX), generator=torch.Generator().manual_seed(5))
    for row in range(batch):
        scheduler.submit(ids[row].tolist(), max_new_tokens=8, sampler=sampler, seed=5 + row)
    for _ in range(2 + 2 * 2):
        events = scheduler.step()
    drafts = tuple(event.token_ids for event in events if isinstance(event, dg.Draft))
    assert len(drafts) == batch
    assert profile(watched, steps=2, prefix=PREFIX, batch=batch, seed=5).drafts == drafts


def test_looking_on_changes_no_bit() -> None:
    watched = model()
    cache, canvas = watched.new_cache(1, PREFIX), torch.arange(5, 13)[None]
    watched.encode(torch.arange(5, 5 + PREFIX)[None], cache)
    recorder = Recorder(watched.weights, [layer.is_sliding for layer in watched.config.layers])
    plain = watched.denoise(canvas, cache, self_conditioning=torch.zeros(1, 8, 512))
    with recorder:
        seen = watched.denoise(canvas, cache, self_conditioning=torch.zeros(1, 8, 512))
    assert torch.equal(seen, plain)
    assert len(recorder.calls) > 50


def test_sizes_are_checked() -> None:
    for sizes, named in (
        ({"prefix": 4097}, "prefix must be in"),
        ({"prefix": 20, "context": 10}, "prefix must be in"),
        ({"prefix": 0}, "prefix must be in"),
        ({"context": 4097}, "context must be in"),
        ({"steps": 0}, "steps must be"),
        ({"batch": 0}, "batch must be"),
    ):
        with pytest.raises(ValueError, match=named):
            profile(model(), **sizes)


# Kernels of a GPU -------------------------------------------------------------------------------------------------


def event(name: str, category: str, begin: float, length: float, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": length, "args": arguments}


def test_kernels_belong_to_the_call_that_launched_them() -> None:
    calls = [
        Call(Part.MLP, "gate_proj", 0, 0, 0, 0),
        Call(Part.ROUTER, "route", 0, 0, 0, 0),
        Call(Part.HEAD, "vocabulary_head", None, 0, 0, 1),
    ]
    events = [
        event(f"{RANGE}0", "user_annotation", 10, 20),
        event(f"{RANGE}1", "user_annotation", 40, 20),
        event(f"{RANGE}2", "user_annotation", 70, 20),
        # The same ranges as the GPU saw them are not the host's.
        event(f"{RANGE}0", "gpu_user_annotation", 1000, 500),
        event("cudaLaunchKernel", "cuda_runtime", 12, 3, correlation=1),
        event("cudaLaunchKernel", "cuda_runtime", 25, 3, correlation=2),
        event("cudaMemsetAsync", "cuda_runtime", 45, 3, correlation=3),
        event("cudaLaunchKernelExC", "cuda_driver", 75, 3, correlation=4),
        # Launched by no call: between two, and after all.
        event("cudaLaunchKernel", "cuda_runtime", 65, 3, correlation=5),
        event("cudaLaunchKernel", "cuda_runtime", 95, 3, correlation=6),
        event("product", "kernel", 1000, 40, correlation=1),
        event("reduction", "kernel", 1050, 10, correlation=2),
        event("memset", "gpu_memset", 1055, 5, correlation=3),
        event("head", "kernel", 1100, 100, correlation=4),
        event("between", "kernel", 1080, 10, correlation=5),
        event("after", "kernel", 1300, 10, correlation=6),
        {"ph": "f", "name": "ac2g", "cat": "ac2g", "ts": 1000},
    ]
    gate, route, head = slices_on_gpu(random.Random(3).sample(events, len(events)), calls)
    assert (gate.part, gate.name, gate.layer, gate.repeat) == (Part.MLP, "gate_proj", 0, 0)
    assert set(gate.kernels) == {"product", "reduction"}
    assert gate.seconds == pytest.approx(50e-6)
    # Its last kernel still ran when the next call's began: in the picture it ends there.
    assert (gate.begin, gate.end) == (pytest.approx(1000e-6), pytest.approx(1055e-6))
    assert route.seconds == pytest.approx(5e-6)
    assert (head.part, head.seconds, head.repeat) == (Part.HEAD, pytest.approx(100e-6), 1)
    with pytest.raises(RuntimeError, match="CUPTI"):
        slices_on_gpu([e for e in events if e["cat"] not in ("kernel", "gpu_memset")], calls)


def test_the_profiler_tells_the_ranges_of_calls_as_they_are_read() -> None:
    """The host's half of a GPU's trace, from torch's own profiler: each launch is put into the range of its call."""
    watched = model()
    recorder = Recorder(watched.weights, [layer.is_sliding for layer in watched.config.layers], ranges=True)
    cache = watched.new_cache(1, PREFIX)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        recorder.begin_pass()
        with recorder:
            watched.encode(torch.arange(5, 25)[None], cache)
    events = events_of(profiler)
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(RANGE)]
    assert len(ranges) == len(recorder.calls) > 50
    for number, one in enumerate(ranges):
        middle = one["ts"] + one["dur"] / 2
        events.append(event("cudaLaunchKernel", "cuda_runtime", middle, 0.0, correlation=number))
        events.append(event("kernel", "kernel", 1e9 + 10 * number, number, correlation=number))
    numbers = [int(one["name"].removeprefix(RANGE)) for one in ranges]
    slices = slices_on_gpu(events, recorder.calls)
    for number, piece in zip(numbers, slices, strict=True):
        call = recorder.calls[number]
        assert (piece.part, piece.name, piece.layer) == (call.part, call.name, call.layer)


# The random model of the true size ----------------------------------------------------------------------------------


def test_the_true_sizes_are_the_published_ones() -> None:
    published = ModelConfig.from_dict({key: value for key, value in PUBLISHED_CONFIG.items() if key != "vision_config"})
    ours = true_config()
    assert ours.layers == published.layers
    for field in ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts", "top_k_experts"):
        assert getattr(ours, field) == getattr(published, field)
    for field in ("vocab_size", "num_attention_heads", "max_position_embeddings", "canvas_length", "dtype"):
        assert getattr(ours, field) == getattr(published, field)
    assert (ours.final_logit_softcapping, ours.rms_norm_eps) == (30.0, 1e-6)
    assert [layer.is_sliding for layer in true_config(layers=2).layers] == [True, False]


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 16,
    "top_k_experts": 2,
    "vocab_size": 300,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "max_position_embeddings": 256,
    "canvas_length": 64,
}


@pytest.mark.parametrize("experts", [12, 32])
def test_a_random_model_routes_to_the_experts_that_are_asked_for(experts: int) -> None:
    made = random_model(true_config(layers=3, **(SMALL | {"num_experts": 32})), "cpu", experts_hit=experts)
    hits = profile(made, steps=1, prefix=16, batch=2).experts_hit
    # A token whose scores are nearly all negative goes to one or two of the others.
    assert max(hits) <= experts + 2
    assert sum(hits) / 3 > 0.75 * experts


def test_a_random_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dgemma_ext.profile import true_size

    monkeypatch.setattr(true_size, "available_bytes", lambda device: 40_000_000_000)
    with pytest.raises(ValueError, match=r"30 layers takes 50\.\d+ GB, and meta has 40 GB free"):
        random_model(true_config(), "meta")
    monkeypatch.setattr(true_size, "available_bytes", lambda device: 100)
    with pytest.raises(ValueError, match="takes"):
        random_model(true_config(layers=1, **SMALL), "cpu")
    with pytest.raises(ValueError, match="experts_hit"):
        random_model(true_config(layers=1, **SMALL), "cpu", experts_hit=17)
