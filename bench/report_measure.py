"""Measures each kind of point. Times are in seconds, on the host's clock with the device idle at both ends."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report_points import Point, Scale

import dgemma_ext as dg
from dgemma_ext.checkpoint import parse_target
from dgemma_ext.cli.profile import fields
from dgemma_ext.profile import profile
from dgemma_ext.profile.true_size import config_dict, random_model, true_config

FLAT = 0.05  # final norm
_PROFILED_STEPS = 4
# What a point of transformers may take, compilation included.
TRANSFORMERS_SECONDS = 900.0


class Measurer:
    """Keeps the last point's random model, so that points of a model need it made once.

    deadline: of time.monotonic(), when what runs in another process is ended.
    """

    def __init__(self, scale: Scale, device: str, deadline: float = float("inf")) -> None:
        self.scale = scale
        self.deadline = deadline
        self.device = torch.device(device)
        self._model: dg.DiffusionGemma | None = None
        self._made: tuple[str, int] | None = None

    def measure(self, point: Point) -> dict[str, Any]:
        """The figures of a point. Raises the exceptions of its run."""
        if point.kind == "transformers":
            self._forget()  # both models do not fit in memory
            limit = min(TRANSFORMERS_SECONDS, max(self.deadline - time.monotonic(), 1.0))
            return measure_transformers(self.scale, point, self.device, limit)
        model = self._model_of(point)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model.weights.norm.fill_(FLAT if point.flat else 1.0)
        found: dict[str, Any] = getattr(self, f"_{point.kind}")(model, point)
        if self.device.type == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        return found

    def _model_of(self, point: Point) -> dg.DiffusionGemma:
        if self._model is None or self._made != point.model:
            self._forget()
            target = None if point.weights == "bfloat16" else parse_target(point.weights)
            config = true_config(self.scale.layers, **self.scale.changes)
            self._model = random_model(config, self.device, target=target, experts_hit=point.experts)
            self._made = point.model
        return self._model

    def _forget(self) -> None:
        self._model = self._made = None
        gc.collect()  # requests that are not finished refer to themselves and to the model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Kinds ------------------------------------------------------------------------------------------------------

    def _fixed(self, model: dg.DiffusionGemma, point: Point) -> dict[str, Any]:
        """The time of a canvas: `steps` denoising steps, the first of which encodes the canvas before it. The first
        canvas warms up; in the last one the first step is timed apart.

        step_seconds: the time of one of the other steps. commit_seconds: by how much the first step is longer.
        tokens_per_second: without prefill, as in the published figures; every canvas encodes the one before it.
        """
        sampler = dg.SamplerConfig(max_denoising_steps=point.steps, confidence_threshold=0.0, eos_token_ids=())
        canvases = 1 + self.scale.repeats
        batch, ends = Batch(model, point, sampler, canvases + 1), []
        for _ in range(canvases):
            batch.finish_canvas()
            ends.append(self._now())
        canvas_seconds = median(end - begin for begin, end in pairwise(ends))
        batch.step()
        first_seconds = self._now() - ends[-1]
        batch.finish_canvas()
        step_seconds = (self._now() - ends[-1] - first_seconds) / (point.steps - 1)
        tokens = point.batch * model.config.canvas_length
        return {
            "canvas_seconds": canvas_seconds,
            "commit_seconds": first_seconds - step_seconds,
            "step_seconds": step_seconds,
            "tokens_per_second": tokens / canvas_seconds,
        }

    def _adaptive(self, model: dg.DiffusionGemma, point: Point) -> dict[str, Any]:
        """Canvases that the sampler stops, from random prompts and weights: their steps say nothing about the
        published model. Prefill is the time by which the first step is longer than the second."""
        canvases = 1 + self.scale.repeats
        batch = Batch(model, point, dg.SamplerConfig(eos_token_ids=()), canvases)
        ends = [self._now()]
        for _ in range(2):
            batch.step()
            ends.append(self._now())
        prefill = max(ends[1] - ends[0] - (ends[2] - ends[1]), 0.0)
        for _ in range(canvases):
            batch.finish_canvas()
        seconds = self._now() - ends[0]
        steps = [count for request in batch.requests for count in request.denoising_steps]
        tokens = point.batch * canvases * model.config.canvas_length
        return {
            "seconds": seconds,
            "prefill_seconds": prefill,
            "tokens_per_second": tokens / max(seconds - prefill, 1e-9),
            "tokens_per_second_with_prefill": tokens / seconds,
            "denoising_steps": sum(steps) / len(steps),
        }

    def _prefill(self, model: dg.DiffusionGemma, point: Point) -> dict[str, Any]:
        seconds = self._encode_seconds(model, 0, point.prefix)
        return {"seconds": seconds, "tokens_per_second": point.prefix / seconds}

    def _profile(self, model: dg.DiffusionGemma, point: Point) -> dict[str, Any]:
        return fields(profile(model, steps=_PROFILED_STEPS, prefix=point.prefix, batch=point.batch))

    def _encode_seconds(self, model: dg.DiffusionGemma, before: int, count: int) -> float:
        """The median time of encoding `tokens` into a slot that holds `before`."""
        cache = model.new_cache(1, before + count)
        if before:
            model.encode(random_ids(model, 1, before), cache)
        saved, ids = cache.snapshot(0), random_ids(model, 1, count)
        times = []
        for _ in range(1 + self.scale.repeats):
            cache.restore(0, saved)
            begin = self._now()
            model.encode(ids, cache)
            times.append(self._now() - begin)
        return median(times[1:])

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def random_ids(model: dg.DiffusionGemma, rows: int, count: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (rows, count), generator=torch.Generator().manual_seed(1))


class Batch:
    """The requests of a point in a scheduler, each with several canvases."""

    def __init__(self, model: dg.DiffusionGemma, point: Point, sampler: dg.SamplerConfig, canvases: int) -> None:
        length = model.config.canvas_length
        max_length = point.prefix + (canvases - 1) * length
        self.scheduler = dg.Scheduler(model, max_batch=point.batch, max_length=max_length)
        self.requests = [
            self.scheduler.submit(ids, max_new_tokens=canvases * length, sampler=sampler, seed=row)
            for row, ids in enumerate(random_ids(model, point.batch, point.prefix).tolist())
        ]
        self._canvases = 0
        self._committed = dict.fromkeys((request.number for request in self.requests), 0)

    def finish_canvas(self) -> None:
        """Runs until every request has one more canvas."""
        self._canvases += 1
        while min(self._committed.values()) < self._canvases:
            self._look_at(self.scheduler.finish_canvas())

    def step(self) -> None:
        """One denoising step of every request."""
        self._look_at(self.scheduler.step())

    def _look_at(self, events: list[dg.Event]) -> None:
        for event in events:
            if isinstance(event, dg.Failure):
                raise event.error
            if isinstance(event, dg.Commit):
                self._committed[event.request.number] += 1


def measure_transformers(scale: Scale, point: Point, device: torch.device, limit: float) -> dict[str, Any]:
    """The last figures of transformers, in a process of its own that ends after so many seconds. Raises RuntimeError
    with its last words where it gave none."""
    order = {
        "config": config_dict(scale.layers, **scale.changes),
        "device": str(device),
        "compile": scale.compile_transformers,
        "canvases": 1 + scale.repeats,
        **point.fields(),
    }
    worker = [sys.executable, str(Path(__file__).with_name("report_transformers.py")), json.dumps(order)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            status = subprocess.run(worker, stdout=out, stderr=err, timeout=limit, check=False).returncode
            end = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            end = f"was ended after {limit:.0f} s"
        out.seek(0)
        err.seek(0)
        lines, said = [line for line in out.read().splitlines() if line.startswith("{")], err.read()
    if not lines:
        raise RuntimeError(f"transformers' process {end}: {said[-300:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    if order["compile"] and not found["compiled"]:
        found["note"] = f"not compiled: the process {end}"
    return found
