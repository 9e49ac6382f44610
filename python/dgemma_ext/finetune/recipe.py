"""From examples to what a step computes: canvases, the chosen one with its noise, and which positions count.

This is the recipe that the model's authors published, with the truncation rule of TRL's script:

- An answer fills whole canvases; behind its end the last one is filled with an end-of-text token, which counts in the
  loss. Of an answer that was truncated the filling does not count.
- One canvas is drawn uniformly, and a noise level t uniformly in [1e-4, 1 - 1e-4]. Each position of the canvas becomes
  with probability t a uniform token of the vocabulary, which may be the true one. All positions of the canvas count in
  the loss, those without noise too, and each the same.
- The encode pass reads the prompt and all clean canvases, and the canvas sees what comes before it. The next-token loss
  of the encode pass counts every pair of neighbours.
- Half of the examples are self-conditioned on a pass over the same canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma_ext.finetune.data import Example
from dgemma_ext.finetune.draws import Purpose, uniforms
from dgemma_ext.finetune.settings import FinetuneSettings

_LEAST_LEVEL = 1e-4


@dataclass(frozen=True)
class Batch:
    """Examples as tensors on the CPU, a row each.

    ids: int64 [B, T], what the encode pass reads, padded on the right. next_weights: float32 [B, T], 1 where the loss
    counts the token after a position. canvas, targets: int64 [B, L], with noise and clean. weights: float32 [B, L].
    lengths: int64 [B], the positions before the canvas. conditioned: bool [B].
    """

    ids: Tensor
    next_weights: Tensor
    canvas: Tensor
    targets: Tensor
    weights: Tensor
    lengths: Tensor
    conditioned: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """The positions that the passes read, without padding."""
        return int(self.lengths.sum()) + self.canvas.numel()

    def rows(self, first: int, last: int) -> Batch:
        """Some of the rows, without columns that are padding in all of them."""
        ids, next_weights, *others = (getattr(self, name)[first:last] for name in self.__dataclass_fields__)
        counted = next_weights.nonzero()[:, 1]
        # The token after the last counted position is read as its target.
        used = max(int(self.lengths[first:last].max()), int(counted.max()) + 2 if len(counted) else 0)
        return Batch(ids[:, :used], next_weights[:, :used], *others)

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def make_batch(
    examples: Sequence[Example],
    epochs: Sequence[int],
    settings: FinetuneSettings,
    canvas_length: int,
    vocabulary: int,
    fill: int,
    pad: int,
) -> Batch:
    """The examples of a step. epochs: the reading of the file that each is drawn in. fill: the token behind an answer's
    end; pad: behind a row."""
    index = torch.tensor([example.index for example in examples], dtype=torch.int64, device="cpu")
    epoch = torch.tensor(list(epochs), dtype=torch.int64, device="cpu")

    def draw(length: int, purpose: Purpose) -> Tensor:
        return uniforms(settings.seed, index, epoch, length, purpose)

    rows = [_filled(example, canvas_length, fill) for example in examples]
    prompts = torch.tensor([len(example.prompt) for example in examples], device="cpu")
    canvases = (torch.tensor([len(row.ids) for row in rows], device="cpu") - prompts) // canvas_length
    lengths = prompts + (draw(1, Purpose.CANVAS)[:, 0] * canvases).long() * canvas_length
    spans = [slice(begin, begin + canvas_length) for begin in lengths.tolist()]
    clean = torch.tensor([row.ids[span] for row, span in zip(rows, spans, strict=True)], device="cpu")
    weights = [row.counted[span] for row, span in zip(rows, spans, strict=True)]

    level = draw(1, Purpose.NOISE_LEVEL)
    level = 1 - level.square() if settings.noise == "high" else _LEAST_LEVEL + (1 - 2 * _LEAST_LEVEL) * level
    noised = draw(canvas_length, Purpose.NOISED) < level
    noise = (draw(canvas_length, Purpose.NOISE_TOKEN) * vocabulary).long()

    # Without a loss of its own the encode pass need not read beyond what the canvas sees.
    has_loss = settings.encoder_loss > 0
    read = [len(row.ids) if has_loss else span.start for row, span in zip(rows, spans, strict=True)]
    ids = torch.full((len(rows), max(read)), pad, dtype=torch.int64, device="cpu")
    next_weights = torch.zeros(ids.shape, dtype=torch.float32, device="cpu")
    for number, (row, count) in enumerate(zip(rows, read, strict=True)):
        ids[number, :count] = torch.tensor(row.ids[:count], device="cpu")
        if has_loss:
            next_weights[number, : count - 1] = torch.tensor(row.counted[1:], device="cpu")
    return Batch(
        ids=ids,
        next_weights=next_weights,
        canvas=torch.where(noised, noise, clean),
        targets=clean,
        weights=torch.tensor(weights, dtype=torch.float32, device="cpu"),
        lengths=lengths,
        conditioned=draw(1, Purpose.SELF_CONDITIONED)[:, 0] < settings.self_conditioning,
    )


@dataclass(frozen=True)
class _Row:
    """A prompt with its answer in whole canvases. counted: for each token whether it counts as a target, 1 or 0."""

    ids: list[int]
    counted: list[float]


def _filled(example: Example, canvas_length: int, fill: int) -> _Row:
    own = len(example.prompt) + len(example.answer)
    filling = -len(example.answer) % canvas_length
    counted = [1.0] * own + [0.0 if example.truncated else 1.0] * filling
    return _Row([*example.prompt, *example.answer, *[fill] * filling], counted)
