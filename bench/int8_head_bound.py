"""What an int8 first pass over the vocabulary could rule out of a denoising step, by a proven bound, per temperature.

    python bench/int8_head_bound.py                      # random weights of the true size, two layers: 13 GB of memory
    python bench/int8_head_bound.py --checkpoint FOLDER  # a model's own

Rows of the head's input and of the embedding are rounded to int8, each under a scale of its own: x = x' + dx, w = w' +
dw. By the inequality of Cauchy and Schwarz x.w is within |dx| |w| + |x'| |dw| of x'.w'; what the sum of the exact
product may lose to rounding in fp32, in any order, is added. Printed for the logits of one step, at each temperature:

- tail: the mass outside a row's heaviest tile of 128 entries, median of the rows;
- tiles: those that an exact pass would have to compute if a tile below 2^-36 of a row's largest entry counted as none
  (2,048 of these are half a unit of fp32), mean of the rows; first if logits were known exactly, then by the bound;
- rows: how many rows must be computed exactly so that acceptance and the comparison of the mean entropy with the
  confidence threshold are certain, where the others' entropies are only known to lie between their bounds.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dgemma_ext as dg
from dgemma_ext import sampling
from dgemma_ext.ops.denoise import VOCABULARY_TILE
from dgemma_ext.profile.true_size import random_model, true_config
from dgemma_ext.sampling import step as step_module

TEMPERATURES = (0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
NEGLIGIBLE = 2.0**-36
PROMPT_TOKENS = 128
VOCABULARY_CHUNK = 8192
ROW_CHUNK = 16


class Logits(NamedTuple):
    """Of every row and entry, [rows, vocabulary]; and the bound of every row and tile, [rows, tiles]."""

    exact: Tensor
    estimate: Tensor
    bound: Tensor


def head_input(model: dg.DiffusionGemma, steps: int) -> Tensor:
    """The rows [canvas_length, hidden_size] that the head is given in the last of so many denoising steps."""
    network, length = model.network, model.config.canvas_length
    kept: list[Tensor] = []
    head = step_module.vocabulary_head

    def keep(hidden: Tensor, *operands: object, **params: object) -> object:
        kept.append(hidden[0].clone())
        return head(hidden, *operands, **params)

    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(1, PROMPT_TOKENS)
    model.encode(prompt, cache)
    batch = sampling.make_canvas_batch(network, 1, length)
    positions = torch.arange(PROMPT_TOKENS, PROMPT_TOKENS + length)
    batch.place(0, 0, PROMPT_TOKENS, network.rotary_tables(positions))
    buffers = sampling.make_step_buffers(network, 1, length)
    sampler = dg.SamplerConfig(confidence_threshold=0.0).resolve(model.defaults, length)
    sampling.begin_canvas(network, batch, 0, sampler, seed=0, index=0)
    step_module.vocabulary_head = keep
    try:
        for number in range(steps):
            sampling.denoising_step(network, cache, batch, buffers, self_conditioned=number > 0)
    finally:
        step_module.vocabulary_head = head
    return kept[-1]


def rounded(x: Tensor) -> Tensor:
    """Every row as int8 numbers times its largest magnitude / 127."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (x / scale).round() * scale


def logits_of(hidden: Tensor, embedding: Tensor) -> Logits:
    x, vocabulary = hidden.float(), embedding.shape[0]
    codes, norm = rounded(x), x.norm(dim=1)
    lost_in_fp32 = (x.shape[1] + 32) * 2.0**-24
    # 1.001: the norms themselves are rounded.
    by_norm, by_error = 1.001 * ((x - codes).norm(dim=1) + lost_in_fp32 * norm), 1.001 * codes.norm(dim=1)
    exact, estimate, bound = [], [], []
    for first in range(0, vocabulary, VOCABULARY_CHUNK):
        w = embedding[first : first + VOCABULARY_CHUNK].float()
        near = rounded(w)
        exact.append((x @ w.T).to(hidden.dtype).float())
        estimate.append(codes @ near.T)
        norms, errors = (of_tiles(v.norm(dim=1)).amax(1) for v in (w, w - near))
        bound.append(by_norm[:, None] * norms + by_error[:, None] * errors)
    return Logits(torch.cat(exact, 1), torch.cat(estimate, 1), torch.cat(bound, 1))


def of_tiles(values: Tensor) -> Tensor:
    return values.unflatten(-1, (-1, VOCABULARY_TILE))


class Rows(NamedTuple):
    """Of every row, [rows]."""

    tail: Tensor
    tiles: Tensor
    tiles_by_bound: Tensor
    entropy: Tensor
    least_entropy: Tensor
    largest_entropy: Tensor


def measure(logits: Logits, softcap: float, temperature: float) -> Rows:
    def z_of(raw: Tensor) -> Tensor:
        return (softcap * torch.tanh(raw / softcap) if softcap > 0 else raw) / temperature

    parts = []
    for first in range(0, logits.exact.shape[0], ROW_CHUNK):
        rows = slice(first, first + ROW_CHUNK)
        estimate, bound = of_tiles(logits.estimate[rows]), logits.bound[rows, :, None]
        upper, lower = z_of(estimate + bound), z_of(estimate - bound)
        exact = of_tiles(z_of(logits.exact[rows]))
        top = exact.amax((1, 2))
        masses = (exact - top[:, None, None]).exp().sum(2)
        by_bound = (upper - lower.amax((1, 2))[:, None, None]).exp().sum(2)
        heaviest = masses.argmax(1)

        def entropy(z: Tensor, exact: Tensor = exact, heaviest: Tensor = heaviest, top: Tensor = top) -> Tensor:
            # The heaviest tile is computed exactly by any first pass.
            z, index = z.clone(), torch.arange(z.shape[0])
            z[index, heaviest] = exact[index, heaviest]
            d = z - top[:, None, None]
            e = d.exp()
            total = e.sum(2).double().sum(1)
            return total.log() - (e * d).sum(2).double().sum(1) / total

        total = masses.double().sum(1)
        parts.append(
            Rows(
                1 - masses.amax(1) / total,
                (masses >= NEGLIGIBLE).sum(1),
                (by_bound >= NEGLIGIBLE).sum(1),
                entropy(exact),
                entropy(lower),
                entropy(upper),
            )
        )
    return Rows(*(torch.cat(values) for values in zip(*parts, strict=True)))


def acceptance_is_certain(least: Tensor, largest: Tensor, bound: float) -> bool:
    """Whether all entropies between `least` and `largest` accept the same rows."""
    order = torch.argsort(least + largest, stable=True)
    before = torch.cumsum((least + largest)[order], 0) / 2
    accepted = 1 + int((before <= bound).sum())
    inside, outside = order[:accepted], order[accepted:]
    if float(largest[inside].sum() - least[inside].max()) > bound:
        return False
    if len(outside) == 0:
        return True
    return bool(largest[inside].max() < least[outside].min()) and float(least[inside].sum()) > bound


def exact_rows(rows: Rows, entropy_bound: float, confidence_threshold: float) -> int:
    """The least number of rows, those of the largest entropies, that make the step's decisions certain."""
    order = torch.argsort(rows.entropy, descending=True)
    least, largest = rows.least_entropy.clone(), rows.largest_entropy.clone()
    for count in range(len(order) + 1):
        if count > 0:
            row = order[count - 1]
            least[row] = largest[row] = rows.entropy[row]
        same_side = (least.mean() < confidence_threshold) == (largest.mean() < confidence_threshold)
        if same_side and acceptance_is_certain(least, largest, entropy_bound):
            return count
    return len(order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a model's folder; default: random weights of the true size")
    parser.add_argument("--steps", type=int, default=3, help="the logits are those of this step (default: 3)")
    arguments = parser.parse_args()
    if arguments.checkpoint is not None:
        model = dg.DiffusionGemma.from_pretrained(arguments.checkpoint, device="cpu")
    else:
        model = random_model(true_config(layers=2), "cpu")
    vocabulary = model.config.vocab_size
    if vocabulary % VOCABULARY_TILE != 0:
        parser.error(f"--checkpoint: got a vocabulary of {vocabulary}, wants a multiple of {VOCABULARY_TILE}")
    sampler = dg.SamplerConfig().resolve(model.defaults, model.config.canvas_length)
    logits = logits_of(head_input(model, arguments.steps), model.weights.embed_tokens)
    error = (logits.estimate - logits.exact).abs()
    print(
        f"raw logits: bound {float(logits.bound.mean()):.2f} (mean); seen, with the rounding to the model's dtype: "
        f"{float(error.max()):.3f} at most, {math.sqrt(float(error.square().mean())):.4f} in the mean of squares"
    )
    print("temperature  tail     entropies' sum  tiles: known / by the bound  rows")
    for temperature in TEMPERATURES:
        rows = measure(logits, model.config.final_logit_softcapping, temperature)
        count = exact_rows(rows, sampler.entropy_bound, sampler.confidence_threshold)
        print(
            f"{temperature:11.2f}  {float(rows.tail.median()):.1e}  {float(rows.entropy.sum()):14.1e}  "
            f"{float(rows.tiles.double().mean()):12.1f} / {float(rows.tiles_by_bound.double().mean()):.1f}"
            f"{count:18d}",
            flush=True,
        )


if __name__ == "__main__":
    main()
