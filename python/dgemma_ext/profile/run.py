"""Runs denoising steps and an encode pass of a model under a Recorder, and sums the time of each part."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch

from dgemma_ext import arguments
from dgemma_ext.checkpoint import ModelConfig
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine import Draft, Event, Failure, Scheduler
from dgemma_ext.ops.denoise import VOCABULARY_TILE
from dgemma_ext.profile.count import (
    Operation,
    StepShape,
    encode_operations,
    expected_experts_hit,
    sizes_of,
    step_operations,
)
from dgemma_ext.profile.kernels import events_of, slices_on_gpu
from dgemma_ext.profile.machine import Machine, measure, measure_after
from dgemma_ext.profile.recorder import Call, Recorder, experts_hit, statistics_in_head
from dgemma_ext.profile.soft_tiles import SoftTiles, soft_tiles
from dgemma_ext.profile.timeline import Pass, Slice, rows_of
from dgemma_ext.profile.tower import TowerTime, tower_time
from dgemma_ext.sampling import SamplerConfig
from dgemma_ext.torch_state import in_own_torch_state

# The first step of a canvas has no self-conditioning; the second warms up the kind of step that is measured.
_WARM_UP = 2
# Steps of a canvas that a loop drives: enough that the host's read at the end does not count.
_DRIVEN_STEPS = 16


@dataclass(frozen=True)
class Profile:
    """The result of `profile`.

    `experts_hit`: mean over the steps, by layer. `soft_tiles`: how many of `vocabulary_tiles` the soft embedding must
    not skip, and how many a GPU's kernels list, means of the steps. `drafts`: each request's last draft.
    `driven_seconds`: the time of a step where a loop drives the steps of a whole canvas; None where requests are
    stepped by turns. `tower`: the time of the vision tower for one image; None for a model without one. `load`: what
    wanted to run on this machine's `cores` when it began, a mean of a minute; None where the system does not count it.
    """

    device: str
    dtype: str
    layers: int
    canvas: int
    prefix: int
    batch: int
    context: int
    machine: Machine
    experts: int
    step: Pass
    encode: Pass
    experts_hit: tuple[float, ...]
    soft_tiles: SoftTiles | None
    vocabulary_tiles: int
    drafts: tuple[tuple[int, ...], ...]
    driven_seconds: float | None
    tower: TowerTime | None
    load: float | None
    cores: int


@in_own_torch_state
def profile(
    model: DiffusionGemma,
    steps: int = 4,
    prefix: int = 128,
    batch: int = 1,
    context: int | None = None,
    seed: int = 0,
    batched: bool | None = None,
) -> Profile:
    """Measures `steps` denoising steps of `batch` requests with `prefix` random tokens each, and one encode pass.

    The scheduler runs the steps; none of them is the first of a canvas. For each recorded step one runs unrecorded.
    context: positions of a cache slot, default the prefix. batched: as in Scheduler.

    On a GPU the times of parts are those of their kernels, from torch's profiler, and the time of a step is the wall
    time where a loop drives the steps of a whole canvas without a Recorder. On a CPU all times are the host's.

    Raises ValueError for sizes that the model does not have.
    """
    arguments.instance("model", model, DiffusionGemma, "a dg.DiffusionGemma")
    prefix, context = check_sizes(model.config, prefix, context)
    steps, batch = arguments.integer("steps", steps, least=1), arguments.integer("batch", batch, least=1)
    seed = arguments.integer("seed", seed, end=2**63)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    # The device whose streams are synchronised and timed; -1 is none.
    with torch.cuda.device(model.device if model.device.type == "cuda" else -1):
        measure(model.device, model.dtype)
        began = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(seed)
        ids = torch.randint(0, model.config.vocab_size, (batch, prefix), generator=generator, device="cpu")
        shared = model.device.type == "cuda" if batched is None else batched
        driven = _driven_seconds(model, ids, context, seed) if shared else None
        watched_steps, drafts = _watched_steps(model, ids, steps, context, seed, batched)
        watched_encode = _watched_encode(model, ids[:1], context)
        machine = measure_after(time.perf_counter() - began, model.device, model.dtype)
        cuda, vision = model.device.type == "cuda", model.vision
        tower = None
        if vision is not None:
            tower = tower_time(vision, machine, lambda run: _length(timed(run, cuda)))

    config, weights, dtype = model.config, sizes_of(model.weights), model.dtype
    expected = [expected_experts_hit(config, batch * config.canvas_length)] * len(config.layers)
    hit = tuple(mean(of_layer) for of_layer in zip(*(watched_steps.hits or [expected]), strict=True))
    tiles = watched_steps.tiles
    soft = SoftTiles(*(mean(counts) for counts in zip(*tiles, strict=True))) if tiles else None
    needed = None if soft is None else (soft.of_row, soft.of_all)
    shape = StepShape(batch, prefix, config.canvas_length, hit, needed, statistics_in_head(model.device))
    step_work = step_operations(config, weights, dtype, shape)
    # The last layer of an encode pass has no experts.
    hit_by_encode = [*watched_encode.hits[0], 0.0] if watched_encode.hits else expected
    encode_work = encode_operations(config, weights, dtype, prefix, hit_by_encode)
    return Profile(
        device=machine.device,
        dtype=str(dtype).removeprefix("torch."),
        layers=len(config.layers),
        canvas=config.canvas_length,
        prefix=prefix,
        batch=batch,
        context=context,
        machine=machine,
        experts=config.num_experts,
        step=watched_steps.finished(step_work, machine, driven),
        encode=watched_encode.finished(encode_work, machine),
        experts_hit=hit,
        soft_tiles=soft,
        vocabulary_tiles=-(-config.vocab_size // VOCABULARY_TILE),
        drafts=drafts,
        driven_seconds=driven,
        tower=tower,
        load=load,
        cores=os.cpu_count() or 1,
    )


def _watched_steps(
    model: DiffusionGemma, ids: torch.Tensor, steps: int, context: int, seed: int, batched: bool | None
) -> tuple[_Watch, tuple[tuple[int, ...], ...]]:
    """Records denoising steps of requests with these prompts; also returns each request's last draft."""
    scheduler = Scheduler(model, max_batch=len(ids), max_length=context, batched=batched, driver="eager")
    # A threshold of 0 is never met, so no canvas ends before the last step, and each step makes a soft embedding.
    cap = max(model.defaults.max_denoising_steps, _WARM_UP + 2 * steps + 1)
    sampler = SamplerConfig(confidence_threshold=0.0, max_denoising_steps=cap)
    for row, prompt in enumerate(ids.tolist()):
        scheduler.submit(prompt, max_new_tokens=model.config.canvas_length, sampler=sampler, seed=seed + row)
    drafts: list[tuple[int, ...]] = []

    def step() -> None:
        drafts[:] = _drafts(scheduler.step())

    for _ in range(_WARM_UP):
        step()
    watch = _Watch(model)
    watch.alternate(step, steps)
    return watch, tuple(drafts)


def _watched_encode(model: DiffusionGemma, ids: torch.Tensor, context: int) -> _Watch:
    """Records an encode pass of ids [1, n] into an empty slot."""
    watch, cache = _Watch(model), model.new_cache(1, context)

    def encode() -> None:
        cache.free(0)
        model.encode(ids, cache)

    watch.alternate(encode, 1)
    return watch


def check_sizes(config: ModelConfig, prefix: int, context: int | None) -> tuple[int, int]:
    """The prefix, and the context, by default the prefix. Raises ValueError for one that does not fit the model."""
    longest = config.max_position_embeddings
    prefix = arguments.integer("prefix", prefix, least=1)
    if context is not None:
        context = arguments.integer("context", context, least=1)
        if context > longest:
            raise arguments.refusal("context", f"in [1, {longest}], the model's", context)
    # A canvas follows the prefix.
    most = min(longest - config.canvas_length, longest if context is None else context)
    if prefix > most:
        limit = f"the model's context of {longest} less a canvas" if most < (context or longest) else "the context"
        raise ValueError(f"prefix must be in [1, {most}], {limit}, got {prefix}")
    return prefix, prefix if context is None else context


def _drafts(events: Sequence[Event]) -> list[tuple[int, ...]]:
    for event in events:
        if isinstance(event, Failure):
            raise event.error
    return [event.token_ids for event in events if isinstance(event, Draft)]


class _Watch:
    """Runs a pass with and without a Recorder."""

    def __init__(self, model: DiffusionGemma) -> None:
        self._cuda = model.device.type == "cuda"
        self._layers = len(model.config.layers)
        sliding = [layer.is_sliding for layer in model.config.layers]
        self._recorder = Recorder(model.weights, sliding, ranges=self._cuda)
        # For each recorded run: experts hit by layer, and the soft embedding's tiles.
        self.hits: list[list[float]] = []
        self.tiles: list[SoftTiles] = []
        # The seconds of unrecorded runs; begin and end of recorded ones on the slices' clock.
        self._unwatched: list[float] = []
        self._spans: list[tuple[float, float]] = []
        self._slices: list[Slice] = []
        # The first use of a dispatch mode in a process imports half a second of torch.
        with self._recorder:
            torch.zeros(1, dtype=torch.float32, device="cpu").add_(1)
        self._recorder.calls.clear()

    def alternate(self, run: Callable[[], None], rounds: int) -> None:
        """Runs a pass `rounds` times unrecorded and `rounds` times recorded."""
        if self._cuda:
            # All unrecorded runs come first, because an active profiler slows them.
            self._unwatched = [_length(timed(run, cuda=True)) for _ in range(rounds)]
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profiler:
                self._spans = [self._watched(run) for _ in range(rounds)]
            self._slices = slices_on_gpu(events_of(profiler), self._recorder.calls)
            self._spans = [self._on_gpu(repeat) for repeat in range(rounds)]
            return
        for _ in range(rounds):
            self._unwatched.append(_length(timed(run)))
            self._spans.append(self._watched(run))
        self._slices = [_slice_of(call) for call in self._recorder.calls]

    def finished(self, operations: Sequence[Operation], machine: Machine, driven: float | None = None) -> Pass:
        """The pass with its times and its counted work. driven: the wall time of a pass, where a loop drove it."""
        seconds = (driven or mean(self._unwatched)) if self._cuda else mean(map(_length, self._spans))
        rows, between = rows_of(self._slices, operations, machine, seconds, len(self._spans))
        return Pass(
            seconds=seconds,
            unwatched_seconds=mean(self._unwatched),
            between=between,
            rows=rows,
            operations=tuple(operations),
            slices=tuple(self._slices),
            spans=tuple(self._spans),
            machine=machine,
        )

    def _on_gpu(self, repeat: int) -> tuple[float, float]:
        """Begin and end of a pass on the kernels' clock."""
        pieces = [piece for piece in self._slices if piece.repeat == repeat]
        return min(piece.begin for piece in pieces), max(piece.end for piece in pieces)

    def _watched(self, run: Callable[[], None]) -> tuple[float, float]:
        def recorded() -> None:
            self._recorder.begin_pass()
            with self._recorder:
                run()

        span = timed(recorded, self._cuda)
        routed = self._recorder.routed
        if routed:
            self.hits.append([float(experts_hit(routed[layer])) for layer in sorted(routed)])
        if self._recorder.soft_embeddings:
            self.tiles.append(soft_tiles(self._recorder.soft_embeddings))
        routed.clear()
        self._recorder.soft_embeddings.clear()
        return span


def _driven_seconds(model: DiffusionGemma, ids: torch.Tensor, context: int, seed: int) -> float:
    """The seconds of a step where a loop drives the steps of a whole canvas, after a first canvas as warm-up."""
    scheduler = Scheduler(model, max_batch=len(ids), max_length=context, batched=True)
    sampler = SamplerConfig(confidence_threshold=0.0, max_denoising_steps=1 + _DRIVEN_STEPS)

    def finish() -> None:
        while not scheduler.idle:
            _drafts(scheduler.finish_canvas())

    for _ in range(2):
        for row, prompt in enumerate(ids.tolist()):
            scheduler.submit(prompt, model.config.canvas_length, sampler, seed + row)
        # The first step encodes the prompt and has no self-conditioning, so it is not timed.
        _drafts(scheduler.step())
        span = timed(finish, model.device.type == "cuda")
    return _length(span) / _DRIVEN_STEPS


def timed(run: Callable[[], object], cuda: bool = False) -> tuple[float, float]:
    """Begin and end of a run on the host's clock. cuda: waits for the GPU before both."""
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return begin, time.perf_counter()


def _length(span: tuple[float, float]) -> float:
    return span[1] - span[0]


def _slice_of(call: Call) -> Slice:
    return Slice(call.part, call.name, call.layer, call.begin, call.end, call.end - call.begin, call.repeat)
