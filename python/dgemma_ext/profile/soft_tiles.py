"""Counts the vocabulary tiles of soft embeddings: those that must not be skipped, and those that a GPU lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Arguments of the soft embedding that are read here.
READ_BY_SOFT_TILES = (
    *("active", "row_max", "row_sum", "tile_max", "tile_sum", "pinned"),
    *("embedding_scale", "tolerance", "max_embedding_norm"),
)
# csrc/denoise/skipped_tiles.h and csrc/denoise/cuda/soft_tiles.h; a test compares with the kernels.
_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}
_MARGIN, _LIMITS, _LIMIT_STEP, _SHARE = 1.02, 6, 4.0, 0.25


class SoftTiles(NamedTuple):
    """Numbers of vocabulary tiles: needed by a row (mean), needed by all rows together, and listed by a GPU's kernels
    for a request (mean), which read no others."""

    of_row: float
    of_all: float
    listed: float


def soft_tiles(soft_embeddings: Sequence[tuple[dict[str, Any], Tensor]]) -> SoftTiles:
    """The tiles of soft embeddings, each given as its arguments by name (READ_BY_SOFT_TILES) and its result.

    A row needs tiles by the rule of ops.denoise.soft_embedding: the mass of the skipped tiles, times the largest norm
    of an embedding, is within the tolerance times the norm of the row's result. The tiles of the largest mass are
    needed. Pinned rows need none.
    """
    needed = [_needed(named, result) for named, result in soft_embeddings]
    listed = [listed_tiles(named, result.dtype).any(-2).sum(-1).double() for named, result in soft_embeddings]
    of_row = torch.cat([of_call.sum(-1).double() for of_call in needed]).mean()
    of_all = torch.cat(needed).any(0).sum()
    return SoftTiles(float(of_row), float(of_all), float(torch.cat(listed).mean()))


def _running(named: dict[str, Any], tensor: Tensor) -> Tensor:
    """The part of a tensor of the requests that are active."""
    return tensor if named.get("active") is None else tensor[named["active"]]


def _has_sum(named: dict[str, Any]) -> Tensor:
    """The rows that have a soft embedding, bool [running, length]."""
    has_sum = _running(named, named["row_sum"]) > 0
    return has_sum if named.get("pinned") is None else has_sum & ~_running(named, named["pinned"])


def _needed(named: dict[str, Any], result: Tensor) -> Tensor:
    """The tiles that each row needs, bool [running rows, tiles]."""
    row_max, row_sum, tile_max, tile_sum = (
        _running(named, named[name]) for name in ("row_max", "row_sum", "tile_max", "tile_sum")
    )
    probabilities = tile_sum.double() * (tile_max - row_max[..., None]).double().exp()
    probabilities = (probabilities / row_sum[..., None]).nan_to_num(0.0)
    probabilities = torch.where(_has_sum(named)[..., None], probabilities, 0.0).flatten(0, -2)
    norms = _running(named, result).double().norm(dim=-1).flatten() / named["embedding_scale"]
    allowed = norms * named["tolerance"] / named["max_embedding_norm"]
    ordered, order = probabilities.sort(dim=-1, descending=True)
    # The probability of a tile and of all that have less.
    rest = ordered.flip(-1).cumsum(-1).flip(-1)
    needed = (rest > allowed[:, None]) & (ordered > 0)
    return torch.zeros_like(needed).scatter(-1, order, needed)


def listed_tiles(named: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The tiles that the first round of a GPU's kernels reads, bool [running, length, tiles]."""
    row_max, tile_max, tile_sum = (_running(named, named[name]) for name in ("row_max", "tile_max", "tile_sum"))
    exponent = tile_max + _ROUNDOFF[dtype] * tile_max.abs() - row_max.to(dtype).float()[..., None]
    bound = torch.where(tile_max > -torch.inf, exponent.exp() * (tile_sum * _MARGIN), 0.0)
    budget = _SHARE * named["tolerance"]
    candidate = budget / bound.shape[-1]
    limit = torch.full_like(bound[..., :1], candidate)
    for _ in range(1, _LIMITS if budget > 0 else 1):
        candidate *= _LIMIT_STEP
        skipped = torch.where(bound <= candidate, bound, 0.0).sum(-1, keepdim=True)
        limit = torch.where(skipped <= budget, candidate, limit)
    return (bound > limit) & _has_sum(named)[..., None]
