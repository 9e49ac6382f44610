"""The operators of `block_attention` in torch's operators: a GPU's form in a build without kernels, and for float32.

Arguments and results are those of `dgemma_ext.ops.block_attention`. Which position a cache row holds, and who sees it,
is computed from the tensors as masks, so attention does not wait for the device (append_to_cache does).
"""

from __future__ import annotations

from typing import Any

import torch

from dgemma_ext.ops.plain.registration import register_on_gpu

NO_POSITION = -1  # of a cache row that holds none


def canvas_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    slot: torch.Tensor,
    prefix_length: torch.Tensor,
    length: torch.Tensor | None = None,
    window: int = 0,
    scale: float = 1.0,
) -> torch.Tensor:
    """Every query sees the last `window - 1` prefix positions (all when `window` is 0) and the whole block."""
    first, end = canvas_visibility(query, prefix_length, length, window)
    return _attend(query, key, value, prefix_key, prefix_value, slot, prefix_length, length, first, end, scale)


def canvas_visibility(
    query: torch.Tensor, prefix_length: torch.Tensor, length: torch.Tensor | None, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row i of request b sees positions first[b, i] .. end[b, i] - 1; both int64 [batch, block]."""
    prefix = prefix_length.long()
    first = (prefix - (window - 1)).clamp_min(0) if window > 0 else torch.zeros_like(prefix)
    end = prefix + _block_rows(query, length)
    rows = query.shape[1]
    return first[:, None].expand(-1, rows), end[:, None].expand(-1, rows)


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    slot: torch.Tensor,
    prefix_length: torch.Tensor,
    length: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
    window: int = 0,
    scale: float = 1.0,
) -> torch.Tensor:
    """The query at position q sees max(0, q - window + 1) .. q, and the spans that hold q."""
    first, end = causal_visibility(query, prefix_length, spans, window)
    return _attend(query, key, value, prefix_key, prefix_value, slot, prefix_length, length, first, end, scale)


def causal_visibility(
    query: torch.Tensor, prefix_length: torch.Tensor, spans: torch.Tensor | None, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `canvas_visibility`, of a block that is encoded."""
    prefix = prefix_length.long()
    position = prefix[:, None] + torch.arange(query.shape[1], dtype=torch.int64, device=query.device)  # [batch, block]
    first = (position - (window - 1)).clamp_min(0) if window > 0 else torch.zeros_like(position)
    end = position + 1
    if spans is not None and spans.shape[1] > 0:
        start, stop = spans.long().unbind(-1)  # [batch, spans]
        inside = (start[:, None] <= position[..., None]) & (position[..., None] < stop[:, None])
        # [batch, block, spans]; a span that does not hold the query changes nothing.
        first = torch.minimum(first, torch.where(inside, start[:, None], first[..., None]).amin(-1))
        end = torch.maximum(end, torch.where(inside, stop[:, None], end[..., None]).amax(-1))
    return first, end


def append_to_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    slot: torch.Tensor,
    prefix_length: torch.Tensor,
    length: torch.Tensor | None = None,
) -> None:
    """Writes row i of the block to row (prefix_length + i) % capacity, the last `capacity` rows of it."""
    capacity, block = prefix_key.shape[1], key.shape[1]
    if capacity == 0 or block == 0:
        return
    row = torch.arange(block, device=key.device)
    rows = _block_rows(key, length)[:, None]
    stored = (row < rows) & (row >= rows - capacity) & (slot[:, None] >= 0)  # [batch, block]
    target = slot.long()[:, None] * capacity + (prefix_length.long()[:, None] + row) % capacity
    for cache, new in ((prefix_key, key), (prefix_value, value)):
        cache.view(-1, *cache.shape[2:])[target[stored]] = new[stored]


def _block_rows(query: torch.Tensor, length: torch.Tensor | None) -> torch.Tensor:
    """Rows of each request's block, int64 [batch]."""
    if length is None:
        return torch.full((query.shape[0],), query.shape[1], dtype=torch.int64, device=query.device)
    return length.long()


def gathered(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    slot: torch.Tensor,
    prefix_length: torch.Tensor,
    length: torch.Tensor | None,
    first: torch.Tensor,
    end: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values of prefix and block, [batch, capacity + block, key heads, head dim], zero where no row sees
    them; which row sees which, bool [batch, block, keys]; and which rows are a query's, bool [batch, block].

    Row i of request b sees positions first[b, i] .. end[b, i] - 1, as far as they are stored; first and end are int64
    [batch, block].
    """
    prefix, capacity = prefix_length.long(), prefix_key.shape[1]
    rows = _block_rows(query, length)
    row = torch.arange(query.shape[1], device=query.device)
    used = (row < rows[:, None]) & (slot[:, None] >= 0)  # [batch, block]

    # Cache row r holds the largest position below the prefix length that is r modulo the capacity.
    ring = torch.arange(capacity, device=query.device)
    last = prefix[:, None] - 1
    in_ring = last - (last - ring) % max(capacity, 1)
    in_block = torch.where(used, prefix[:, None] + row, NO_POSITION)
    position = torch.cat([in_ring.clamp_min(NO_POSITION), in_block], dim=1)  # [batch, keys]
    seen = (position[:, None] >= first[..., None]) & (position[:, None] < end[..., None])
    seen = seen & (position[:, None] >= 0) & used[..., None]  # [batch, block, keys]

    # Rows that nobody sees may hold anything, NaN too.
    anyone = seen.any(dim=1)[..., None, None]
    stored = slot.clamp_min(0).long()
    keys = torch.where(anyone, torch.cat([prefix_key[stored], key], dim=1), 0)
    values = torch.where(anyone, torch.cat([prefix_value[stored], value], dim=1), 0)
    return keys, values, seen, used


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    slot: torch.Tensor,
    prefix: torch.Tensor,
    length: torch.Tensor | None,
    first: torch.Tensor,
    end: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of rows that see what `gathered` says of first and end."""
    if prefix_key.shape[0] == 0:  # without slots every request is skipped
        return torch.zeros_like(query)
    cached = (prefix_key, prefix_value, slot, prefix)
    keys, values, seen, used = gathered(query, key, value, *cached, length, first, end)
    return _attend_seen(query, keys, values, seen, used, scale)


def _attend_seen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    used: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Of query [batch, block, query heads, head dim] and keys [batch, keys, key heads, head dim]: row i of request b
    sees key j where seen[b, i, j], and rows that are not `used` are zero."""
    batch, block, query_heads, head_dim = query.shape
    key_heads = keys.shape[2]
    group = query_heads // key_heads
    queries = torch.where(used[..., None, None], query, 0).float().view(batch, block, key_heads, group, head_dim)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", queries, keys.float()) * scale
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    # A row without keys is padding: its softmax is NaN and is replaced.
    attended = torch.einsum("bhgqk,bkhd->bqhgd", scores.softmax(dim=-1), values.float())
    attended = torch.where(used[..., None, None, None], attended, 0)
    return attended.reshape(query.shape).to(query.dtype)


def paged_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    sequence_length: torch.Tensor,
    causal: torch.Tensor,
    spans: torch.Tensor | None = None,
    max_query_length: int = 0,
    window: int = 0,
    scale: float = 1.0,
) -> torch.Tensor:
    """The forms above by request, with all positions gathered out of their pages."""
    requests, most = page_table.shape[0], max_query_length
    rows, source, used = _rows_of_requests(query, query_start, most)
    if requests == 0 or most == 0 or key_pages.shape[0] == 0:
        return torch.zeros_like(query)
    blocks = torch.where(used[..., None, None], query[source], 0)
    prefix = sequence_length.long() - rows
    by_row = causal_visibility(blocks, prefix, spans, window)
    by_canvas = canvas_visibility(blocks, prefix, rows, window)
    is_causal = (causal != 0)[:, None]
    first, end = (torch.where(is_causal, *pair) for pair in zip(by_row, by_canvas, strict=True))
    position = torch.arange(page_table.shape[1] * key_pages.shape[1], device=query.device)
    seen = (position >= first[..., None]) & (position < end[..., None]) & used[..., None]  # [requests, most, positions]
    seen = seen & (position < sequence_length.long()[:, None])[:, None]
    anyone = seen.any(dim=1)[..., None, None]
    page = page_table.long().repeat_interleave(key_pages.shape[1], dim=1)
    page = torch.where(anyone[..., 0, 0], page, 0)  # what nobody sees may be any number
    keys, values = (
        torch.where(anyone, pages[page, position % key_pages.shape[1]], 0) for pages in (key_pages, value_pages)
    )
    attended = _attend_seen(blocks, keys, values, seen, used, scale)
    # Of rows that are nobody's the last is written last, and then cut off.
    result = query.new_zeros(query.shape[0] + 1, *query.shape[1:])
    result[torch.where(used, source, query.shape[0])] = attended
    return result[:-1]


def _rows_of_requests(
    query: torch.Tensor, query_start: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of each request, int64 [requests]; which row of `query` its row i is, and whether it has one, [requests,
    most]."""
    start = query_start.long()
    rows = start[1:] - start[:-1]
    row = torch.arange(most, device=query.device)
    used = row < rows[:, None]
    return rows, torch.where(used, start[:-1, None] + row, 0), used


def append_to_pages(
    key: torch.Tensor, value: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, slot: torch.Tensor
) -> None:
    """Writes row i to row slot[i] % page size of page slot[i] // page size, where the slot is not negative."""
    stored, page_size = slot >= 0, key_pages.shape[1]
    page, row = slot[stored] // page_size, slot[stored] % page_size
    key_pages[page, row], value_pages[page, row] = key[stored], value[stored]


def _into(out: torch.Tensor, result: torch.Tensor, slot: torch.Tensor, length: torch.Tensor | None) -> None:
    """Copies the rows that are a query's; the others stay."""
    row = torch.arange(out.shape[1], device=out.device)
    used = (row < _block_rows(out, length)[:, None]) & (slot[:, None] >= 0)
    out.copy_(torch.where(used[..., None, None], result, out))


def canvas_attention_out(*operands: Any, out: torch.Tensor, workspace: torch.Tensor | None = None) -> None:
    """`canvas_attention` into `out`; the workspace is not used."""
    _into(out, canvas_attention(*operands), slot=operands[5], length=operands[7])


def causal_attention_out(*operands: Any, out: torch.Tensor, workspace: torch.Tensor | None = None) -> None:
    """`causal_attention` into `out`; the workspace is not used."""
    _into(out, causal_attention(*operands), slot=operands[5], length=operands[7])


def paged_attention_out(*operands: Any, out: torch.Tensor, workspace: torch.Tensor | None = None) -> None:
    """`paged_attention` into `out`; the workspace is not used."""
    query_start = operands[4].long()
    row = torch.arange(out.shape[0], device=out.device)
    used = (row >= query_start[0]) & (row < query_start[-1])
    out.copy_(torch.where(used[:, None, None], paged_attention(*operands), out))


for _name, _function in (
    ("canvas_attention", canvas_attention),
    ("canvas_attention.out", canvas_attention_out),
    ("batched_canvas_attention", canvas_attention),
    ("batched_canvas_attention.out", canvas_attention_out),
    ("causal_attention", causal_attention),
    ("causal_attention.out", causal_attention_out),
    ("append_to_cache", append_to_cache),
    ("paged_attention", paged_attention),
    ("paged_attention.out", paged_attention_out),
    ("append_to_pages", append_to_pages),
):
    register_on_gpu(f"dgemma::{_name}", _function)
