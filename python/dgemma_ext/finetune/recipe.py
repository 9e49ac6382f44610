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

    counts = torch.tensor([-(-len(example.answer) // canvas_length) for example in examples], device="cpu")
    chosen = (draw(1, Purpose.CANVAS)[:, 0] * counts).long()
    level = draw(1, Purpose.NOISE_LEVEL)
    level = 1 - level.square() if settings.noise == "high" else _LEAST_LEVEL + (1 - 2 * _LEAST_LEVEL) * level
    noised = draw(canvas_length, Purpose.NOISED) < level
    noise = (draw(canvas_length, Purpose.NOISE_TOKEN) * vocabulary).long()
    conditioned = draw(1, Purpose.SELF_CONDITIONED)[:, 0] < settings.self_conditioning

    rows, weights = [], []
    for example, count in zip(examples, counts.tolist(), strict=True):
        filling = count * canvas_length - len(example.answer)
        rows.append([*example.prompt, *example.answer, *[fill] * filling])
        counted = [1.0] * len(example.answer) + [0.0 if example.truncated else 1.0] * filling
        weights.append(counted)
    lengths = torch.tensor([len(example.prompt) for example in examples], device="cpu") + chosen * canvas_length
    targets, canvas_weights = [], []
    for row, counted, begin, example in zip(rows, weights, lengths.tolist(), examples, strict=True):
        first = begin - len(example.prompt)
        targets.append(row[begin : begin + canvas_length])
        canvas_weights.append(counted[first : first + canvas_length])
    width = max(map(len, rows)) if settings.encoder_loss > 0 else int(lengths.max())
    ids = torch.full((len(rows), width), pad, dtype=torch.int64, device="cpu")
    next_weights = torch.zeros((len(rows), width), dtype=torch.float32, device="cpu")
    for number, (row, counted, example) in enumerate(zip(rows, weights, examples, strict=True)):
        used = min(len(row), width) if settings.encoder_loss > 0 else int(lengths[number])
        ids[number, :used] = torch.tensor(row[:used], device="cpu")
        if settings.encoder_loss > 0:
            # The prompt's own neighbours count, and of the answer those whose second is counted.
            pairs = [1.0] * (len(example.prompt) - 1) + counted
            next_weights[number, : len(pairs)] = torch.tensor(pairs, device="cpu")
    clean = torch.tensor(targets, dtype=torch.int64, device="cpu")
    return Batch(
        ids=ids,
        next_weights=next_weights,
        canvas=torch.where(noised, noise, clean),
        targets=clean,
        weights=torch.tensor(canvas_weights, dtype=torch.float32, device="cpu"),
        lengths=lengths,
        conditioned=conditioned,
    )
