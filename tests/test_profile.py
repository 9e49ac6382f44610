"""The profile of a step: every operator in its part, rows that sum to the step, and recording changes no result."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import pytest
import torch

import dgemma_ext as dg
from dgemma_ext.checkpoint import ModelConfig
from dgemma_ext.profile import machine, profile, run
from dgemma_ext.profile.count import PLAIN, total
from dgemma_ext.profile.kernels import events_of, slices_on_gpu
from dgemma_ext.profile.machine import Machine
from dgemma_ext.profile.parts import Part
from dgemma_ext.profile.recorder import RANGE, Call, Recorder
from dgemma_ext.profile.true_size import random_model, true_config
from profiles import PREFIX, SMALL, STEPS, model, profiled
from published_layout import PUBLISHED_CONFIG

# The operators of each part of a step, written from modeling_diffusion_gemma.py and not from the package's table.
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
    [(1, "auto", False), (3, "auto", False), (1, "fp8", False), (1, "nvfp4", True), (3, "auto", True)],
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
    # The GELUs of a pass: one in the self-conditioning, and one in every layer.
    gelus = {(piece.part, piece.layer) for piece in found.step.slices if piece.name == "gelu_product"}
    assert gelus == {(Part.EMBEDDING, None), (Part.MLP, 0), (Part.MLP, 1), (Part.MLP, 2)}


@pytest.mark.parametrize("batched", [False, True])
def test_every_counted_operation_was_recorded(batched: bool) -> None:
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
    device = Machine("none", bandwidth=100.0, peaks={PLAIN: 10.0, "fp8": 20.0})
    assert device.floor(400.0, {PLAIN: 30.0}) == 4.0
    assert device.floor(200.0, {PLAIN: 30.0}) == 3.0
    assert device.floor(0.0, {PLAIN: 30.0, "fp8": 30.0}) == 4.5
    assert Machine("none", 100.0, {PLAIN: 10.0}).floor(0.0, {"fp8": 30.0}) == 3.0


def test_a_batched_step_counts_the_same() -> None:
    """Three requests in a batch of four rows: the fourth hits no expert and needs no tile."""
    alone, together = profiled(3), profiled(3, batched=True)
    assert together.experts_hit == alone.experts_hit
    assert together.soft_tiles == alone.soft_tiles
    assert [row.bytes for row in together.step.rows] == [row.bytes for row in alone.step.rows]
    assert alone.driven_seconds is None
    assert together.driven_seconds is not None
    assert together.driven_seconds > 0
    of_experts = [sum(piece.name == "moe_ffn" for piece in found.step.slices) for found in (alone, together)]
    assert of_experts == [3 * 3 * STEPS, 3 * STEPS]


def test_long_work_is_followed_by_another_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Machine("cpu", 10.0, {PLAIN: 4.0}), Machine("cpu", 9.0, {PLAIN: 5.0})]
    monkeypatch.setattr(machine, "_measure_cpu", lambda dtype: found.pop(0))
    machine.measure.cache_clear()
    device = torch.device("cpu")
    assert machine.measure_after(0.1, device, torch.bfloat16) == Machine("cpu", 10.0, {PLAIN: 4.0})
    assert machine.measure_after(1e3, device, torch.bfloat16) == Machine("cpu", 10.0, {PLAIN: 5.0})
    assert found == []
    machine.measure.cache_clear()


@pytest.mark.parametrize("batch", [1, 2])
def test_recording_changes_no_token(batch: int) -> None:
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


def test_recording_changes_no_bit() -> None:
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
        ({"prefix": 0}, "prefix must be an integer in"),
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
        # The GPU's own times of the ranges must not be used.
        event(f"{RANGE}0", "gpu_user_annotation", 1000, 500),
        event("cudaLaunchKernel", "cuda_runtime", 12, 3, correlation=1),
        event("cudaLaunchKernel", "cuda_runtime", 25, 3, correlation=2),
        event("cudaMemsetAsync", "cuda_runtime", 45, 3, correlation=3),
        event("cudaLaunchKernelExC", "cuda_driver", 75, 3, correlation=4),
        # These kernels belong to no call: one between two calls, and one after all.
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
    # Its last kernel still runs when the next call's begins, so its slice ends there.
    assert (gate.begin, gate.end) == (pytest.approx(1000e-6), pytest.approx(1055e-6))
    assert route.seconds == pytest.approx(5e-6)
    assert (head.part, head.seconds, head.repeat) == (Part.HEAD, pytest.approx(100e-6), 1)
    with pytest.raises(RuntimeError, match="CUPTI"):
        slices_on_gpu([e for e in events if e["cat"] not in ("kernel", "gpu_memset")], calls)


def test_launches_in_a_trace_are_inside_the_ranges_of_their_calls() -> None:
    """The host's half of a GPU's trace, from torch's profiler: each launch is inside the range of its call."""
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


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_profile_from_gpu_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU in place of a GPU: each call launches one kernel of 3 us, as torch's profiler would report it."""
    launched: list[int] = []

    def with_kernels(profiler: Any) -> list[dict[str, Any]]:
        events = events_of(profiler)
        for number, one in enumerate(e for e in events.copy() if e.get("name", "").startswith(RANGE)):
            launched.append(number)
            begin = one["ts"] + one["dur"] / 2
            events.append(event("cudaLaunchKernel", "cuda_runtime", begin, 0.0, correlation=number))
            events.append(event(f"kernel {number}", "kernel", 1e9 + 5 * number, 3.0, correlation=number))
        return events

    monkeypatch.setattr(run, "events_of", with_kernels)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    watched = model()
    watch = run._Watch(watched)
    watch._cuda = True
    watch._recorder = Recorder(watched.weights, [layer.is_sliding for layer in watched.config.layers], ranges=True)
    cache = watched.new_cache(1, PREFIX)

    def encode() -> None:
        cache.free(0)
        watched.encode(torch.arange(5, 25)[None], cache)

    watch.alternate(encode, 2)
    device = Machine("none", bandwidth=1e9, peaks={PLAIN: 1e9})
    one = watch.finished([], device, driven=0.5)
    # The step's time is that of the driven loop; the kernels are those of the recorded steps.
    assert one.seconds == 0.5
    assert sum(row.seconds for row in one.rows) == pytest.approx(0.5)
    assert one.between == pytest.approx(0.5 - 3e-6 * len(launched) / 2)
    assert len(one.slices) == len(launched) == len(watch._recorder.calls)
    assert {piece.kernels for piece in one.slices} == {(f"kernel {number}",) for number in launched}
    first, second = one.spans
    assert first[0] == pytest.approx(1e3)
    assert first[1] <= second[0] < second[1] == pytest.approx(1e3 + 5e-6 * (len(launched) - 1) + 3e-6)
    assert {piece.repeat for piece in one.slices if first[0] <= piece.begin < first[1]} == {0}
    alone = watch.finished([], device)
    assert alone.seconds == alone.unwatched_seconds == one.unwatched_seconds > 0


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


@pytest.mark.parametrize("experts", [12, 32])
def test_a_random_model_routes_to_the_experts_that_are_asked_for(experts: int) -> None:
    made = random_model(true_config(layers=3, **(SMALL | {"num_experts": 32})), "cpu", experts_hit=experts)
    hits = profile(made, steps=1, prefix=16, batch=2).experts_hit
    # A token whose scores are nearly all negative goes to one or two of the other experts.
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
