"""The operators of `denoise` in torch's operators: a GPU's form in a build without kernels, and for float32.

The meaning is that of csrc/include/dgemma/denoise.h; tests hold both to the same
float64 oracle. The functions run on any device and look at no value on the host.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import dgemma_ext._C as _C
from dgemma_ext.ops.plain.registration import register_on_gpu, register_with_out

VOCABULARY_TILE = _C.VOCABULARY_TILE
_STATISTICS = ("argmax", "entropy", "row_max", "row_sum", "tile_max", "tile_sum")
_WORD = 0xFFFFFFFF
_RENOISE = 2
_SAMPLE = 1
# Rows of logits that are worked on at a time: 16 x 262,144 in float32 are 16 MiB.
_ROWS = 16


def philox_uniforms(seed: Tensor, canvas_index: Tensor, step: Tensor, length: int, purpose: int) -> Tensor:
    """The uniforms of one purpose, float64 [batch, length]: top 53 bits of the first two words of Philox4x32-10."""
    position = torch.arange(length, device=seed.device).expand(seed.shape[0], length)
    counter = [
        canvas_index.to(torch.int64)[:, None].expand_as(position) & _WORD,
        step.to(torch.int64)[:, None].expand_as(position) & _WORD,
        position & _WORD,
        torch.full_like(position, purpose),
    ]
    words = philox4x32_10(counter, seed[:, None] & _WORD, (seed[:, None] >> 32) & _WORD)
    return ((words[0] << 21) | (words[1] >> 11)).to(torch.float64) * 2.0**-53


def philox4x32_10(counter: list[Tensor], key0: Tensor, key1: Tensor) -> list[Tensor]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); 32-bit words held in int64."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # int64 products wrap, but the 64 bits are right.
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((high >> 32) & _WORD) ^ c1 ^ key0,
            high & _WORD,
            ((low >> 32) & _WORD) ^ c3 ^ key1,
            low & _WORD,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def allowed_mask(
    vocabulary: int, allowed: Tensor | None, allowed_row: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Tensor:
    """The bits of every position, bool [batch, length, vocabulary]."""
    if allowed is None or allowed_row is None:
        return torch.ones(1, 1, 1, dtype=torch.bool, device=device).expand(*shape, vocabulary)
    bits = (allowed[:, :, None] >> torch.arange(32, device=device, dtype=torch.int32)) & 1
    rows = bits.flatten(1)[:, :vocabulary].to(torch.bool)
    everything = torch.ones(1, vocabulary, dtype=torch.bool, device=device)
    return torch.cat([everything, rows])[(allowed_row + 1).to(torch.int64)]


def _active(active: Tensor | None, batch: int, device: torch.device) -> Tensor:
    return torch.ones(batch, dtype=torch.bool, device=device) if active is None else active


def _scaled(raw: Tensor, softcap: float, temperature: Tensor) -> Tensor:
    """z of rows [rows, vocabulary]; temperature [rows]."""
    a = raw.to(torch.float32)
    if softcap > 0:
        a = torch.tanh(a / softcap) * softcap
    return a / temperature[:, None]


def _tiles(values: Tensor, fill: float) -> Tensor:
    """[rows, vocabulary] as [rows, tiles, VOCABULARY_TILE], the last tile filled up."""
    padding = -values.shape[1] % VOCABULARY_TILE
    return torch.nn.functional.pad(values, (0, padding), value=fill).view(values.shape[0], -1, VOCABULARY_TILE)


def vocabulary_statistics_out(*operands: Any, workspace: Tensor | None = None, **outputs: Tensor) -> None:
    """Into the given tensors; the workspace is not used."""
    logits, softcap, temperature, active, allowed, allowed_row = operands
    batch, length, vocabulary = logits.shape
    running = _active(active, batch, logits.device)
    for b in range(batch):
        for first in range(0, length, _ROWS):
            rows = slice(first, min(first + _ROWS, length))
            mask = _rows_allowed(logits, vocabulary, allowed, allowed_row, b, rows)
            results = _row_statistics(logits[b, rows], softcap, temperature[b], mask)
            for name, result in zip(_STATISTICS, results, strict=True):
                output = outputs[name]
                output[b, rows] = torch.where(running[b], result.to(output.dtype), output[b, rows])


def _rows_allowed(
    logits: Tensor, vocabulary: int, allowed: Tensor | None, allowed_row: Tensor | None, b: int, rows: slice
) -> Tensor:
    index = None if allowed_row is None else allowed_row[b : b + 1, rows]
    return allowed_mask(vocabulary, allowed, index, (1, rows.stop - rows.start), logits.device)[0]


def _row_statistics(raw: Tensor, softcap: float, temperature: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    rows = raw.shape[0]
    finite = (torch.isfinite(raw) | ~mask).all(-1)
    z = _scaled(raw, softcap, temperature.expand(rows)).masked_fill(~mask, -math.inf)
    z = torch.where(finite[:, None], z, 0.0)
    tiles = _tiles(z, -math.inf)  # [rows, tiles, tile]
    tile_max = tiles.amax(-1)
    shifted = torch.where(tiles > -math.inf, tiles - tile_max[..., None], -math.inf)
    tile_sum = torch.exp(shifted).sum(-1)
    row_max = tile_max.amax(-1)
    row_sum = (tile_sum.to(torch.float64) * torch.exp(tile_max - row_max[:, None]).to(torch.float64)).sum(-1)
    d = (z - row_max[:, None]).to(torch.float64)
    weights = torch.exp(d)
    t = torch.where(weights > 0, weights * d, 0.0).sum(-1)
    entropy = torch.log(row_sum) - t / weights.sum(-1)
    # The first of the largest: torch.argmax does not promise which.
    candidates = raw.to(torch.float32).masked_fill(~mask, -math.inf)
    ids = torch.arange(raw.shape[1], device=raw.device)
    largest = torch.where(mask & (candidates == candidates.amax(-1, keepdim=True)), ids, raw.shape[1]).amin(-1)
    argmax = torch.where(finite, largest, torch.where(mask, ids, raw.shape[1]).amin(-1))
    nan = torch.full_like(entropy, math.nan)
    return argmax, torch.where(finite, entropy, nan), row_max, torch.where(finite, row_sum, nan), tile_max, tile_sum


def sample_out(*operands: Any, out: Tensor) -> None:
    logits, softcap, temperature, active, allowed, allowed_row, row_max, row_sum, tile_max, tile_sum = operands[:10]
    seed, canvas_index, step, uniforms = operands[10:]
    batch, length, vocabulary = logits.shape
    if uniforms is None:
        uniforms = philox_uniforms(seed, canvas_index, step, length, _SAMPLE)
    running = _active(active, batch, logits.device)
    factor = torch.exp(tile_max - row_max[..., None])
    masses = torch.where(tile_sum > 0, tile_sum.to(torch.float64) * factor.to(torch.float64), 0.0)
    tile, before = _first_above(masses, uniforms * row_sum)  # [batch, length]
    left = uniforms * row_sum - before
    # Entries of the chosen tile; those past the vocabulary have no mass.
    ids = tile[..., None] * VOCABULARY_TILE + torch.arange(VOCABULARY_TILE, device=logits.device)
    inside = ids.clamp(max=vocabulary - 1)
    mask = allowed_mask(vocabulary, allowed, allowed_row, (batch, length), logits.device)
    present = (ids < vocabulary) & mask.gather(-1, inside)
    raw = logits.gather(-1, inside)
    z = _scaled(raw.flatten(0, 1), softcap, temperature.repeat_interleave(length)).view_as(raw)
    chosen_max = tile_max.gather(-1, tile[..., None])
    weights = torch.where(present, torch.exp(z - chosen_max), 0.0).to(torch.float64)
    weights = weights * factor.gather(-1, tile[..., None]).to(torch.float64)
    entry, _ = _first_above(weights, left)
    token = ids.gather(-1, entry[..., None])[..., 0]
    lowest = torch.where(mask, torch.arange(vocabulary, device=logits.device), vocabulary).amin(-1)
    token = torch.where(row_sum > 0, token, lowest).to(torch.int32)
    out.copy_(torch.where(running[:, None], token, out))


def _first_above(masses: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first entry whose cumulative mass exceeds the target, or of the last that has any, and what is
    before it; masses [..., n], target [...]."""
    cumulative = masses.cumsum(-1)
    index = torch.arange(masses.shape[-1], device=masses.device).expand_as(masses)
    above = torch.where((cumulative > target[..., None]) & (masses > 0), index, masses.shape[-1]).amin(-1)
    last = torch.where(masses > 0, index, 0).amax(-1)
    chosen = torch.where(above < masses.shape[-1], above, last)
    before = (cumulative - masses).gather(-1, chosen[..., None])[..., 0]
    return chosen, before


def merge_vocabulary_shards_out(*operands: Any, **outputs: Tensor) -> None:
    best, argmax, entropy, row_max, row_sum, rank, seed, canvas_index, step, nonempty, active, uniforms = operands
    shards, batch, length = best.shape
    live = torch.ones_like(best, dtype=torch.bool) if nonempty is None else nonempty
    first = live.to(torch.int32).argmax(0)  # 0 where all are empty
    # The first of equals; of NaNs, which no comparison finds, the first that is not empty.
    candidates = torch.where(live, torch.nan_to_num(best.to(torch.float64), -math.inf), -math.inf)
    index = torch.arange(shards, device=best.device)[:, None, None]
    leading = torch.where(live & (candidates == candidates.amax(0)), index, shards).amin(0)
    leading = torch.where(torch.isnan(best.gather(0, first[None])[0]) | (leading == shards), first, leading)
    greatest = torch.where(live, row_max, -math.inf).amax(0)
    change = row_max.to(torch.float64) - greatest.to(torch.float64)
    mass = torch.where(live, row_sum * torch.exp(change), 0.0)
    total = mass.sum(0)
    shifted = mass * (torch.log(row_sum) - entropy.to(torch.float64) + change)
    entropies = torch.log(total) - torch.where(mass > 0, shifted, 0.0).sum(0) / total
    finite = (total > 0) & (total < math.inf)
    if uniforms is None:
        uniforms = philox_uniforms(seed, canvas_index, step, length, _SAMPLE)
    masses = torch.where(mass > 0, mass, 0.0).movedim(0, -1)
    chosen, before = _first_above(masses, uniforms * total)
    inside = (uniforms * total - before) / masses.gather(-1, chosen[..., None])[..., 0]
    inside = torch.where(chosen == rank, inside.clamp(0.0, 1.0 - 2.0**-53), 0.0)
    results = {
        "merged_argmax": torch.where(live.any(0), argmax.gather(0, leading[None])[0], 0),
        "merged_entropy": torch.where(finite, entropies, math.nan),
        "merged_row_max": greatest,
        "merged_row_sum": torch.where(finite, total, math.nan),
        "share": torch.where(finite & live[rank], mass[rank] / total, 0.0),
        "owner": torch.where(finite, chosen, first),
        "own_uniform": torch.where(finite, inside, 0.0),
    }
    running = _active(active, batch, best.device)[:, None]
    for name, result in results.items():
        outputs[name].copy_(torch.where(running, result.to(outputs[name].dtype), outputs[name]))


def noise_(
    tokens: Tensor,
    vocabulary: int,
    purpose: int,
    seed: Tensor,
    canvas_index: Tensor,
    step: Tensor,
    active: Tensor | None,
    keep: Tensor | None,
    uniforms: Tensor | None,
) -> None:
    batch, length = tokens.shape
    if uniforms is None:
        uniforms = philox_uniforms(seed, canvas_index, step, length, purpose)
    fresh = _uniform_tokens(uniforms, vocabulary)
    write = _active(active, batch, tokens.device)[:, None].expand(batch, length)
    if keep is not None:
        write = write & ~keep
    tokens.copy_(torch.where(write, fresh, tokens))


def _uniform_tokens(uniforms: Tensor, vocabulary: int) -> Tensor:
    """floor(u * vocabulary) of every position, int32 [batch, length]."""
    return (uniforms * vocabulary).floor().clamp(max=vocabulary - 1).to(torch.int32)


def update_canvas_(
    sampled: Tensor,
    argmax: Tensor,
    entropy: Tensor,
    pinned: Tensor | None,
    uniforms: Tensor | None,
    vocabulary: int,
    seed: Tensor,
    canvas_index: Tensor,
    max_steps: Tensor,
    t_min: Tensor,
    t_max: Tensor,
    entropy_bound: Tensor,
    stability_threshold: Tensor,
    confidence_threshold: Tensor,
    active: Tensor,
    canvas: Tensor,
    draft: Tensor,
    stable_steps: Tensor,
    step: Tensor,
    temperature: Tensor,
    accepted: Tensor,
    mean_entropy: Tensor,
    status: Tensor,
) -> None:
    fixed = torch.zeros_like(accepted) if pinned is None else pinned
    finite = (torch.isfinite(entropy) | fixed).all(-1)
    going = active & finite  # [batch]
    if uniforms is None:
        uniforms = philox_uniforms(seed, canvas_index, step, canvas.shape[1], _RENOISE)
    fresh = _uniform_tokens(uniforms, vocabulary)

    # Pinned positions sort last, and cannot be accepted.
    entropies = torch.where(fixed, math.inf, entropy).to(torch.float64)
    ordered, order = torch.sort(entropies, dim=-1, stable=True)
    before = torch.cat([torch.zeros_like(ordered[:, :1]), ordered.cumsum(-1)[:, :-1]], dim=-1)
    within = before <= entropy_bound.to(torch.float64)[:, None]
    new_accepted = torch.zeros_like(accepted).scatter(-1, order, within) & ~fixed
    counted = (~fixed).sum(-1)
    total = torch.where(fixed, 0.0, entropy.to(torch.float64)).sum(-1)
    new_mean = torch.where(counted > 0, total / counted.clamp(min=1), 0.0).to(torch.float32)
    new_canvas = torch.where(fixed, canvas, torch.where(new_accepted, sampled, fresh))
    new_draft = torch.where(fixed, canvas, argmax)
    unchanged = ((draft == argmax) | fixed).all(-1)
    new_stable_steps = torch.where(unchanged, stable_steps + 1, 0).to(torch.int32)

    stable = (new_stable_steps >= stability_threshold) & (new_mean < confidence_threshold)
    last = step >= max_steps
    new_status = torch.where(stable, 1, torch.where(last, 2, 0)).to(torch.int32)
    share = (max_steps - step).to(torch.float32) / max_steps.to(torch.float32)
    new_temperature = t_min.to(torch.float32) + (t_max - t_min).to(torch.float32) * share

    def write(target: Tensor, value: Tensor, where: Tensor) -> None:
        target.copy_(torch.where(where.view(-1, *[1] * (target.dim() - 1)), value, target))

    write(accepted, new_accepted & finite[:, None], active)
    write(mean_entropy, torch.where(finite, new_mean, math.nan), active)
    write(status, torch.where(finite, new_status, 3), active)
    write(canvas, new_canvas, going)
    write(draft, new_draft, going)
    write(stable_steps, new_stable_steps, going)
    write(temperature, new_temperature, going)
    write(step, step + 1, going)
    active.copy_(going & ~stable & ~last)


def soft_embedding_out(*operands: Any, out: Tensor, workspace: Tensor | None = None) -> None:
    """Always dense; one request at a time, so that a request's result does not depend on its batch."""
    logits, softcap, temperature, active, allowed, allowed_row, _, row_sum, _, _ = operands[:10]
    pinned, embedding, embedding_scale, _, _ = operands[10:]
    batch, length, vocabulary = logits.shape
    running = _active(active, batch, logits.device)
    scale = torch.tensor(embedding_scale, dtype=logits.dtype, device=logits.device)
    for b in range(batch):
        index = None if allowed_row is None else allowed_row[b : b + 1]
        mask = allowed_mask(vocabulary, allowed, index, (1, length), logits.device)[0]
        z = _scaled(logits[b], softcap, temperature[b].expand(length)).masked_fill(~mask, -math.inf)
        p = torch.softmax(z.to(logits.dtype), dim=-1, dtype=torch.float32).to(logits.dtype)
        soft = (p @ embedding) * scale
        soft = torch.where(row_sum[b, :, None] > 0, soft, math.nan).to(logits.dtype)
        if pinned is not None:
            soft = torch.where(pinned[b, :, None], 0.0, soft).to(logits.dtype)
        out[b] = torch.where(running[b], soft, out[b])


vocabulary_statistics, sample, merge_vocabulary_shards, soft_embedding = (
    register_with_out(name, out_form)
    for name, out_form in (
        ("vocabulary_statistics", vocabulary_statistics_out),
        ("sample", sample_out),
        ("merge_vocabulary_shards", merge_vocabulary_shards_out),
        ("soft_embedding", soft_embedding_out),
    )
)
register_on_gpu("dgemma::noise_", noise_)
register_on_gpu("dgemma::update_canvas_", update_canvas_)
