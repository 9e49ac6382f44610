"""Finds the keys that a row's queries see in an attention mask, in the form that the kernels take.

A mask is recognised by its values, all of which are checked. Two kinds are supported: masks in which every query of a
row sees the same keys (a canvas over any prefix), and causal masks, with padding on either side, with or without the
layer's window, with or without spans whose tokens all see each other (an image's).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Some keys of a row: a range where they are contiguous, else their indices.
Keys = slice | Tensor


@dataclass(frozen=True)
class Row:
    """One row of a batch: queries[i] and keys[block][i] are the same position, and keys[prefix] come before.

    Queries outside `queries` see nothing, or are padding. spans: for causal attention, ranges of positions, counted
    from the first key of the prefix, whose tokens all see each other.
    """

    queries: slice
    prefix: Keys
    block: Keys
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Visibility:
    """The visible keys of a batch. `rows` has one entry for all rows or one for each; None: a row sees nothing."""

    causal: bool
    window: int  # for causal attention; 0 is none
    rows: tuple[Row | None, ...]


def without_mask(queries: int, keys: int, causal: bool) -> Visibility | None:
    """The visibility that transformers' sdpa_attention_forward assumes without a mask."""
    if causal and queries > 1:
        # Queries are aligned with the first keys; keys after the last query are unused ones of a static cache.
        block = slice(0, queries)
        return Visibility(True, 0, (Row(block, slice(0, 0), block),)) if keys >= queries else None
    if keys < queries:
        return None
    return Visibility(False, 0, (Row(slice(0, queries), slice(0, keys - queries), slice(keys - queries, keys)),))


def of_mask(mask: Tensor, queries: int, keys: int, window: int) -> Visibility | None:
    """Reads a boolean mask [rows, 1, queries, keys] (True: visible); None where the kernels do not support it.

    window: the layer's, 0 for none. The result is kept with the tensor, because many layers and steps use a mask.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, queries, keys) or 0 in mask.shape:
        return None
    key = (window, 0 if mask.is_inference() else mask._version)
    known: dict[tuple[int, int], Visibility | None] = mask.__dict__.setdefault("_dgemma_visibility", {})
    if key not in known:
        seen = mask[:, 0]
        known[key] = _same_for_all_queries(seen) or _causal(seen, window)
    return known[key]


def _same_for_all_queries(seen: Tensor) -> Visibility | None:
    """seen: bool [rows, queries, keys]."""
    queries = seen.shape[1]
    if not bool((seen == seen[:, :1]).all()):
        return None
    rows: list[Row | None] = []
    for keys in seen[:, 0]:
        visible = keys.nonzero()[:, 0]
        if len(visible) == 0:
            rows.append(None)
        elif len(visible) < queries:
            return None  # the kernels' block is as long as the queries
        else:
            prefix, block = visible[: len(visible) - queries], visible[len(visible) - queries :]
            rows.append(Row(slice(0, queries), _range(prefix), _range(block)))
    return Visibility(False, 0, _merged(rows))


def _causal(seen: Tensor, window: int) -> Visibility | None:
    """seen: bool [rows, queries, keys]. The valid keys of a row are those that any query sees."""
    _, queries, keys = seen.shape
    valid = seen.any(dim=1)
    if not bool(valid.any()):
        return None
    # The last query of the least padded row is at the last valid key.
    start = int(valid.any(dim=0).nonzero().max()) + 1 - queries
    if start < 0:
        return None
    position = start + torch.arange(queries, device=seen.device)[:, None]
    key = torch.arange(keys, device=seen.device)
    causal = key <= position
    if window > 0:
        causal &= key > position - window
    spans: list[list[tuple[int, int]]] = [[] for _ in valid]
    if not torch.equal(seen, causal & valid[:, None]):
        spans = _spans(seen, start)
        whole = torch.stack([_with_spans(causal, start, spans_of_row) for spans_of_row in spans])
        if not torch.equal(seen, whole & valid[:, None]):
            return None
    rows: list[Row | None] = []
    for keys_of_row, spans_of_row in zip(valid, spans, strict=True):
        visible = keys_of_row.nonzero()[:, 0]
        in_prefix, in_block = visible[visible < start], visible[visible >= start]
        block = _range(in_block)
        # A query whose own key is hidden is padding in a causal mask; with spans its result may be used.
        if any(spans) and not bool(keys_of_row[start + queries - 1]):
            return None
        if len(in_block) == 0:
            rows.append(None)
            continue
        prefix = _range(in_prefix)
        touches = len(in_prefix) == 0 or (isinstance(prefix, slice) and prefix.stop == int(in_block[0]))
        # A window counts positions, so a gap inside it cannot be closed.
        binds = 0 < window < start + queries
        if not isinstance(block, slice) or ((binds or spans_of_row) and not touches):
            return None
        first = int(visible[0])
        counted = tuple((begin - first, end - first) for begin, end in spans_of_row)
        rows.append(Row(slice(block.start - start, block.stop - start), prefix, block, counted))
    return Visibility(True, window, _merged(rows))


def _spans(seen: Tensor, start: int) -> list[list[tuple[int, int]]]:
    """The spans of each row: a query that sees beyond itself begins one, which ends with the last key that it sees."""
    ends = (seen * torch.arange(1, seen.shape[2] + 1, dtype=torch.int32, device=seen.device)).amax(-1)
    found: list[list[tuple[int, int]]] = []
    for ends_of_row in ends.tolist():
        spans: list[tuple[int, int]] = []
        for position, end in enumerate(ends_of_row, start=start):
            if end > position + 1 and (not spans or position >= spans[-1][1]):
                spans.append((position, end))
        found.append(spans)
    return found


def _with_spans(causal: Tensor, start: int, spans: list[tuple[int, int]]) -> Tensor:
    """`causal`, bool [queries, keys], in which the tokens of a span see each other too."""
    whole = causal.clone()
    for begin, end in spans:
        whole[begin - start : end - start, begin:end] = True
    return whole


def _range(indices: Tensor) -> Keys:
    """Ascending indices as a range, where they are contiguous."""
    if len(indices) == 0:
        return slice(0, 0)
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last + 1 - first == len(indices) else indices


def _merged(rows: list[Row | None]) -> tuple[Row | None, ...]:
    """One entry where all rows are equal, so that a batch is one call."""
    first = rows[0]
    alike = first is not None and isinstance(first.prefix, slice) and isinstance(first.block, slice)
    return (first,) if alike and all(_same_slices(row, first) for row in rows) else tuple(rows)


def _same_slices(row: Row | None, other: Row | None) -> bool:
    if row is None or other is None or isinstance(row.prefix, Tensor) or isinstance(row.block, Tensor):
        return False
    return (row.queries, row.prefix, row.block, row.spans) == (other.queries, other.prefix, other.block, other.spans)
