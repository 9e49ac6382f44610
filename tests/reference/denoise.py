"""The denoise step in float64, written to be read: what csrc/include/dgemma/denoise.h says, one position at a time.

B batch, L canvas length, V vocabulary, N tiles, H hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TILE = 128


def scaled(logits: Tensor, softcap: float, temperature: Tensor) -> Tensor:
    """z, float64 [B, L, V], from raw logits [B, L, V] and temperature [B]."""
    a = logits.to(torch.float64)
    if softcap > 0:
        a = softcap * torch.tanh(a / softcap)
    return a / temperature.to(torch.float64)[:, None, None]


def allowed_ids(allowed: Tensor | None, allowed_row: Tensor | None, b: int, i: int, vocabulary: int) -> list[int]:
    """What position i of request b may hold, from bit rows int32 [rows, ceil(V / 32)] and row indices int32 [B, L]."""
    if allowed is None or allowed_row is None or int(allowed_row[b, i]) < 0:
        return list(range(vocabulary))
    words = allowed[int(allowed_row[b, i])].tolist()
    return [v for v in range(vocabulary) if words[v // 32] >> (v % 32) & 1]


def mask_of(allowed: Tensor | None, allowed_row: Tensor | None, shape: tuple[int, int, int]) -> Tensor:
    """Allowed entries, bool [B, L, V]."""
    batch, length, vocabulary = shape
    mask = torch.zeros(shape, dtype=torch.bool)
    for b in range(batch):
        for i in range(length):
            mask[b, i, torch.tensor(allowed_ids(allowed, allowed_row, b, i, vocabulary))] = True
    return mask


@dataclass
class Statistics:
    argmax: Tensor  # int64 [B, L]
    entropy: Tensor  # [B, L]
    row_max: Tensor  # [B, L]
    row_sum: Tensor  # [B, L]
    tile_max: Tensor  # [B, L, N]
    tile_sum: Tensor  # [B, L, N]


def vocabulary_statistics(logits: Tensor, softcap: float, temperature: Tensor, mask: Tensor) -> Statistics:
    """Everything float64; mask is bool [B, L, V]."""
    z = torch.where(mask, scaled(logits, softcap, temperature), -math.inf)  # [B, L, V]
    row_max = z.amax(-1)
    e = torch.exp(z - row_max[..., None])
    row_sum = e.sum(-1)
    t = torch.where(e > 0, e * (z - row_max[..., None]), 0.0).sum(-1)
    padding = -logits.shape[-1] % TILE
    tiles = torch.nn.functional.pad(z, (0, padding), value=-math.inf).unflatten(-1, (-1, TILE))  # [B, L, N, TILE]
    tile_max = tiles.amax(-1)
    tile_sum = torch.where(tiles > -math.inf, torch.exp(tiles - tile_max[..., None]), 0.0).sum(-1)
    raw = torch.where(mask, logits.to(torch.float64), -math.inf)
    argmax = torch.from_numpy(raw.numpy().argmax(-1))  # numpy gives the first of equals
    return Statistics(argmax, torch.log(row_sum) - t / row_sum, row_max, row_sum, tile_max, tile_sum)


def boundaries(logits: Tensor, softcap: float, temperature: Tensor, mask: Tensor) -> Tensor:
    """The cumulative distribution over ids, float64 [B, L, V]: id v is drawn when u lies in [c[v - 1], c[v])."""
    z = torch.where(mask, scaled(logits, softcap, temperature), -math.inf)
    return torch.softmax(z, dim=-1).cumsum(-1)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(seed: int, canvas: int, step: int, position: int, purpose: int) -> float:
    seed &= 0xFFFFFFFFFFFFFFFF
    words = philox((canvas, step, position, purpose), (seed & 0xFFFFFFFF, seed >> 32))
    return ((words[0] << 32 | words[1]) >> 11) / 2**53


def uniform_token(ids: list[int], u: float) -> int:
    return ids[min(math.floor(u * len(ids)), len(ids) - 1)]


@dataclass
class Canvas:
    """One request's state, as lists of L and numbers."""

    tokens: list[int]
    draft: list[int]
    stable_steps: int
    step: int
    active: bool = True
    accepted: list[bool] | None = None
    mean_entropy: float = 0.0
    status: int = 0
    temperature: float = 0.0


def update_canvas(
    canvas: Canvas,
    sampled: list[int],
    argmax: list[int],
    entropy: np.ndarray,  # float32 [L]
    pinned: list[bool],
    fresh: list[int],  # the renoising token of every position
    max_steps: int,
    t_min: float,
    t_max: float,
    entropy_bound: float,
    stability_threshold: int,
    confidence_threshold: float,
) -> Canvas:
    length = len(sampled)
    free = [i for i in range(length) if not pinned[i]]
    accepted = [False] * length
    taken = 0.0
    for i in sorted(free, key=lambda i: (float(entropy[i]), i)):
        accepted[i] = taken <= np.float32(entropy_bound)
        taken += float(entropy[i])
    tokens = [canvas.tokens[i] if pinned[i] else sampled[i] if accepted[i] else fresh[i] for i in range(length)]
    draft = [canvas.tokens[i] if pinned[i] else argmax[i] for i in range(length)]
    unchanged = all(draft[i] == canvas.draft[i] for i in free)
    stable_steps = canvas.stable_steps + 1 if unchanged else 0
    mean = np.float32(sum(float(entropy[i]) for i in free) / len(free) if free else 0.0)
    stable = stable_steps >= stability_threshold and mean < np.float32(confidence_threshold)
    last = canvas.step == max_steps
    share = np.float32(max_steps - canvas.step) / np.float32(max_steps)
    temperature = np.float32(t_min) + np.float32(t_max - t_min) * share
    status = 1 if stable else 2 if last else 0
    return Canvas(
        tokens, draft, stable_steps, canvas.step + 1, status == 0, accepted, float(mean), status, float(temperature)
    )


def soft_embedding(
    logits: Tensor, softcap: float, temperature: Tensor, mask: Tensor, embedding: Tensor, scale: float
) -> Tensor:
    """float64 [B, L, H], with the roundings to the logits' dtype that the definition names and no other."""
    dtype = logits.dtype

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(torch.float64)

    # Rounded from fp32, as every implementation has it: a z that is a float64 hair from a boundary is no matter here.
    z = scaled(logits, softcap, temperature).to(torch.float32)
    z = torch.where(mask, rounded(z), -math.inf)
    p = rounded(torch.softmax(z, dim=-1))
    return rounded(p @ embedding.to(torch.float64)) * rounded(torch.tensor(scale))
