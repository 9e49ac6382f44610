"""Attention of a block of new positions over a cached prefix and over the block itself.

The block of request b covers positions P .. P + n - 1 with P = prefix_length[b] and n = length[b]; prefix position p
lies in row p % capacity of slot[b] in `prefix_key` and `prefix_value`. So one layout serves a full layer, whose
capacity covers the whole context, and a ring that keeps the last positions of a sliding window.

Shapes: query [batch, block, query heads, head dim]; key and value [batch, block, key heads, head dim]; prefix_key and
prefix_value [slots, capacity, key heads, head dim]; slot, prefix_length and length [batch], int32; spans [batch, spans,
2], int32. Tensors of numbers are all float32 or all bfloat16. Query head h reads key head h // (query heads / key
heads). Everything is contiguous and on one device.

`paged_attention` and `append_to_pages` are the same over a pool of pages and a page table, as engines like vLLM keep
their cache; their docstrings have their shapes.

Every function raises ValueError, naming the argument, for a wrong shape, dtype, device or layout, and for numbers that
are out of range. The latter are looked at by the CPU kernels only: on a GPU that would wait for the device.
"""

from __future__ import annotations

import torch

from dgemma_ext.ops.description import workspace_bytes
from dgemma_ext.ops.operators import operator

_canvas_attention, _canvas_attention_out = operator("canvas_attention"), operator("canvas_attention.out")
_batched, _batched_out = operator("batched_canvas_attention"), operator("batched_canvas_attention.out")
_causal_attention, _causal_attention_out = operator("causal_attention"), operator("causal_attention.out")
_append_to_cache = operator("append_to_cache")
_paged_attention, _paged_attention_out = operator("paged_attention"), operator("paged_attention.out")
_append_to_pages = operator("append_to_pages")


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
    *,
    batch_invariant: bool = True,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bidirectional attention of a canvas: every query sees the same keys, the last `window - 1` prefix positions (all
    of them when `window` is 0) and the whole block. That is what transformers' sliding layers give their decoder
    (modeling_diffusion_gemma.py with its dynamic cache).

    Scores are multiplied by `scale`; softmax and sums are float32. A request with slot -1 is skipped, `length` None
    means whole blocks. Returns a tensor like `query`, zero in rows at and after `length[b]` and in skipped requests.
    With `out` these rows are left as they are; `workspace` then is what `attention_workspace` gives for these sizes,
    or None to allocate it.

    Without `batch_invariant` the bits of a request's result may depend on the number of requests on a GPU, where a
    batch needs fewer splits of each request's keys to fill it. On a CPU they never do.
    """
    operands = (query, key, value, prefix_key, prefix_value, slot, prefix_length, length, window, scale)
    if out is None:
        result: torch.Tensor = (_canvas_attention if batch_invariant else _batched)(*operands)
        return result
    (_canvas_attention_out if batch_invariant else _batched_out)(*operands, out=out, workspace=workspace)
    return out


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
    *,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a block that is being encoded: the query at position q sees positions
    max(0, q - window + 1) .. q (0 .. q when `window` is 0).

    `spans` holds ranges [start, end) of absolute positions, the tokens of an image, say: a query inside a span also
    sees the rest of it, as far as it is in the cache or in the block. start == end is an empty span; spans may overlap.
    All else is as in `canvas_attention`.
    """
    operands = (query, key, value, prefix_key, prefix_value, slot, prefix_length, length, spans, window, scale)
    if out is None:
        result: torch.Tensor = _causal_attention(*operands)
        return result
    _causal_attention_out(*operands, out=out, workspace=workspace)
    return out


def append_to_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    slot: torch.Tensor,
    prefix_length: torch.Tensor,
    length: torch.Tensor | None = None,
) -> None:
    """Stores the block's keys and values at rows (prefix_length + i) % capacity of their slots.

    Of a block longer than the capacity only the last `capacity` rows. A request with slot -1 is skipped; two requests
    may not name the same slot. `prefix_length` itself is the caller's to advance.
    """
    _append_to_cache(key, value, prefix_key, prefix_value, slot, prefix_length, length)


def paged_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    sequence_length: torch.Tensor,
    causal: torch.Tensor,
    spans: torch.Tensor | None = None,
    *,
    max_query_length: int,
    window: int = 0,
    scale: float = 1.0,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """`canvas_attention` and `causal_attention` of a batch whose keys and values, the block's too, lie in pages.

    Shapes: query [tokens, query heads, head dim]; key_pages and value_pages [pages, page size, key heads, head dim] of
    any strides but the last dimension's, which is contiguous (on a GPU strides are multiples of 16 bytes); page_table
    [requests, pages of a request], query_start [requests + 1], sequence_length and causal [requests], all int32; spans
    [requests, spans, 2], int32.

    Request b has rows query_start[b] .. query_start[b + 1] - 1, at most `max_query_length`: its last positions of
    sequence_length[b]. Position p is in row p % page size of page page_table[b, p // page size]. The request is a
    canvas where causal[b] is 0, and else causal, with its `spans`; either sees what the contiguous form sees, with the
    same bits. Entries of the table for positions that no query sees are not read.

    Returns a tensor like `query`, zero in rows of no request; with `out` these are left as they are, and `workspace` is
    uint8 of the size that `paged_attention_workspace_bytes` tells, or None to allocate it.
    """
    operands = (query, key_pages, value_pages, page_table, query_start, sequence_length, causal, spans)
    numbers = (max_query_length, window, scale)
    if out is None:
        result: torch.Tensor = _paged_attention(*operands, *numbers)
        return result
    _paged_attention_out(*operands, *numbers, out=out, workspace=workspace)
    return out


def append_to_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot: torch.Tensor,
) -> None:
    """Stores row i of key and value, [tokens, key heads, head dim], in row slot[i] % page size of page
    slot[i] // page size; a row whose slot is negative is not stored.

    slot [tokens], int64, no slot twice. Pages as in `paged_attention`; their rows may not overlap, but those of keys
    and of values may take turns in memory.
    """
    _append_to_pages(key, value, key_pages, value_pages, slot)


def paged_attention_workspace_bytes(
    requests: int, max_query_length: int, query_heads: int, key_heads: int, head_dim: int, device: torch.device | str
) -> int:
    """Bytes of workspace of `paged_attention` of these sizes on this device."""
    return workspace_bytes(
        "paged_attention",
        bfloat16=True,
        cuda=torch.device(device).type == "cuda",
        requests=requests,
        max_query_length=max_query_length,
        query_heads=query_heads,
        key_heads=key_heads,
        head_dim=head_dim,
    )


def attention_workspace(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """An uninitialised workspace for `canvas_attention` and `causal_attention` of these sizes."""
    batch, block, query_heads, head_dim = query.shape
    size = attention_workspace_bytes(batch, block, query_heads, key.shape[2], head_dim, query.device)
    return torch.empty(size, dtype=torch.uint8, device=query.device)


def attention_workspace_bytes(
    batch: int, block_length: int, query_heads: int, key_heads: int, head_dim: int, device: torch.device | str
) -> int:
    """Bytes of workspace of attention of these sizes on this device."""
    return workspace_bytes(
        "canvas_attention",
        bfloat16=True,
        cuda=torch.device(device).type == "cuda",
        batch=batch,
        block_length=block_length,
        query_heads=query_heads,
        key_heads=key_heads,
        head_dim=head_dim,
        length=1,  # requests of any length: what needs most
    )
