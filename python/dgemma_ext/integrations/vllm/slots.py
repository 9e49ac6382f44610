"""The canvases of vLLM's request slots: tensors on the device that the rows of a step are gathered from.

vLLM keeps a request's state in a slot and tells a step which slots its rows are. A step gathers these rows, advances
them together and scatters them again; it reads nothing on the host, so nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dgemma_ext.integrations.vllm.contents import Window
from dgemma_ext.ops import denoise
from dgemma_ext.ops.denoise import CanvasStatus
from dgemma_ext.sampling import Canvas, ResolvedSampler


class Rows(NamedTuple):
    """The state of n canvases, [n, L] or [n]: copies of their slots, which a step changes in place."""

    canvas: Tensor  # int32 [n, L]
    draft: Tensor  # int32 [n, L], -1 before the first step
    seed: Tensor  # int64
    canvas_index: Tensor  # int32
    step: Tensor  # int32
    max_steps: Tensor  # int32
    t_min: Tensor  # fp64
    t_max: Tensor  # fp64
    entropy_bound: Tensor  # fp32
    stability_threshold: Tensor  # int32
    confidence_threshold: Tensor  # fp32
    temperature: Tensor  # fp32
    active: Tensor  # bool: the canvas is being denoised
    stable_steps: Tensor  # int32
    mean_entropy: Tensor  # fp32
    status: Tensor  # int32, ops.denoise.CanvasStatus
    matches: Tensor  # int32: 0 where no canvas matched the grammar
    width: Tensor  # int32: positions of the request's canvases, at most L
    given: Tensor  # int32: the number of tokens in its content
    start_step: Tensor  # int32: of canvases with tokens
    first_temperature: Tensor  # fp32: of step 1
    start_temperature: Tensor  # fp32: of start_step


_DTYPES = {
    **dict.fromkeys(Rows._fields, torch.int32),
    "active": torch.bool,
    **dict.fromkeys(("t_min", "t_max"), torch.float64),
    **dict.fromkeys(("entropy_bound", "confidence_threshold", "mean_entropy"), torch.float32),
    **dict.fromkeys(("temperature", "first_temperature", "start_temperature"), torch.float32),
    "seed": torch.int64,
}
_BY_POSITION = ("canvas", "draft")


class Slots:
    """The rows of `count` slots for canvases of up to `length` positions."""

    def __init__(self, count: int, length: int, vocabulary: int, device: torch.device) -> None:
        self.count, self.length, self.vocabulary = count, length, vocabulary
        shapes = {name: (count, length) if name in _BY_POSITION else (count,) for name in Rows._fields}
        self._all = Rows(*(torch.zeros(shapes[name], dtype=_DTYPES[name], device=device) for name in Rows._fields))

    def place(self, slot: int, sampler: ResolvedSampler, seed: int, canvas_index: int, content: Canvas) -> None:
        """Gives a slot to a request that has finished `canvas_index` canvases. `begin` then begins the next."""
        values = {
            "seed": seed,
            "canvas_index": canvas_index,
            "max_steps": sampler.max_denoising_steps,
            "t_min": sampler.t_min,
            "t_max": sampler.t_max,
            "entropy_bound": sampler.entropy_bound,
            "stability_threshold": sampler.stability_threshold,
            "confidence_threshold": sampler.confidence_threshold,
            "active": False,
            "width": sampler.canvas_length,
            "given": len(content.tokens),
            "start_step": content.start_step,
            "first_temperature": sampler.temperature(1),
            "start_temperature": sampler.temperature(content.start_step),
        }
        for name, value in values.items():
            getattr(self._all, name)[slot].fill_(value)

    def clear(self, slot: int) -> None:
        self._all.active[slot].fill_(False)

    def gather(self, slots: Tensor) -> Rows:
        """The rows of some slots, int64 [n]."""
        return Rows(*(tensor.index_select(0, slots) for tensor in self._all))

    def scatter(self, slots: Tensor, rows: Rows) -> None:
        for tensor, row in zip(self._all, rows, strict=True):
            tensor.index_copy_(0, slots, row)

    def begin(self, rows: Rows, where: Tensor, window: Window | None) -> None:
        """Begins the canvas `canvas_index` of the rows where it is wanted, bool [n]: noise, and what the window holds.

        window: of these canvases; None where no row has a content.
        """
        given = None if window is None else window.tokens >= 0
        canvas = torch.zeros_like(rows.canvas) if window is None else window.tokens.clamp(min=0)
        denoise.noise_(
            canvas,
            vocabulary=self.vocabulary,
            purpose=denoise.Purpose.INITIAL_NOISE,
            seed=rows.seed,
            canvas_index=rows.canvas_index,
            step=torch.zeros_like(rows.step),
            active=where,
            keep=given,
        )
        has_tokens = rows.given > rows.canvas_index * rows.width
        step = torch.where(has_tokens, rows.start_step, 1)
        temperature = torch.where(has_tokens, rows.start_temperature, rows.first_temperature)
        for tensor, value in (
            (rows.canvas, canvas),
            (rows.draft, -1),
            (rows.step, step),
            (rows.temperature, temperature),
            (rows.active, True),
            (rows.stable_steps, 0),
            (rows.mean_entropy, 0.0),
            (rows.status, int(CanvasStatus.RUNNING)),
            (rows.matches, 1),
        ):
            tensor.copy_(torch.where(where.view(-1, *[1] * (tensor.dim() - 1)), value, tensor))
