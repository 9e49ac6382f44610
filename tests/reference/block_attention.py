"""Block attention written out for one request, in float64 or in any type, over an explicit list of positions.

Nothing here knows of slots and rings: `keys` and `values` are what was ever computed for positions 0 .. P + n - 1, the
prefix first and the block of n after it, and a mask says who sees what.
"""

from __future__ import annotations

import torch


def canvas_mask(prefix_length: int, length: int, window: int) -> torch.Tensor:
    """bool [length, prefix_length + length]: the last window - 1 prefix positions (window 0: all) and the block."""
    mask = torch.ones(length, prefix_length + length, dtype=torch.bool)
    for position in range(prefix_length):
        distance_from_block = prefix_length - position  # 1 for the last position of the prefix
        if window > 0 and distance_from_block > window - 1:
            mask[:, position] = False
    return mask


def causal_mask(
    prefix_length: int,
    length: int,
    window: int,
    spans: list[tuple[int, int]] | None = None,
    capacity: int | None = None,
) -> torch.Tensor:
    """bool [length, prefix_length + length]: oneself, window - 1 positions before (window 0: all) and one's spans.

    Of a span, what has left the cache (all but the last `capacity` positions of the prefix) is not seen.
    """
    total = prefix_length + length
    query = torch.arange(prefix_length, total)[:, None]  # [length, 1]
    key = torch.arange(total)[None]  # [1, total]
    mask = key <= query
    if window > 0:
        mask &= query - key < window
    stored = key >= (0 if capacity is None else prefix_length - capacity)
    for start, end in spans or []:
        mask |= (start <= query) & (query < end) & (start <= key) & (key < end) & stored
    return mask


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    one_by_one: bool = False,
) -> torch.Tensor:
    """Softmax attention [n, H, D] of query [n, H, D] over keys and values [N, KH, D] under mask [n, N].

    Keys and values that no query sees take no part, whatever they hold. With a low-precision `dtype` products and
    probabilities are rounded to it and the softmax is float32, as transformers' eager attention does. `one_by_one` adds
    the products of a score up in order, the plainest of all ways; a matrix product keeps several partial sums.
    """
    anyone = mask.any(dim=0)  # [N]
    mask = mask[:, anyone]
    group = query.shape[1] // keys.shape[1]
    keys = keys[anyone].repeat_interleave(group, dim=1).to(dtype)  # [seen, H, D]
    values = values[anyone].repeat_interleave(group, dim=1).to(dtype)  # [seen, H, D]
    query = query.to(dtype)
    if one_by_one:
        scores = torch.zeros(query.shape[1], query.shape[0], keys.shape[0], dtype=dtype)
        for d in range(query.shape[2]):
            scores += query[:, :, d].t()[:, :, None] * keys[:, :, d].t()[:, None]
    else:
        scores = torch.einsum("qhd,khd->hqk", query, keys)
    scores = scores * scale  # [H, n, seen]
    softmax_type = torch.float64 if dtype == torch.float64 else torch.float32
    scores = scores.masked_fill(~mask, float("-inf"))
    probabilities = scores.softmax(dim=-1, dtype=softmax_type).to(dtype)
    return torch.einsum("hqk,khd->qhd", probabilities, values)
