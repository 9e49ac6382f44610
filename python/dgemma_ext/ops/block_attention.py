"""Attention of a block of new positions over a cached prefix and over the block itself.

The block of request b covers positions P .. P + n - 1 with P = prefix_length[b] and n = length[b]; prefix position p
lies in row p % capacity of slot[b] in `prefix_key` and `prefix_value`. So one layout serves a full layer, whose
capacity covers the whole context, and a ring that keeps the last positions of a sliding window.

Shapes: query [batch, block, query heads, head dim]; key and value [batch, block, key heads, head dim]; prefix_key and
prefix_value [slots, capacity, key heads, head dim]; slot, prefix_length and length [batch], int32; spans [batch, spans,
2], int32. Tensors of numbers are all float32 or all bfloat16. Query head h reads key head h // (query heads / key
heads). Everything is contiguous and on one device.

Every function raises ValueError, naming the argument, for a wrong shape, dtype, device or layout, and for numbers that
are out of range. The latter are looked at by the CPU kernels only: on a GPU that would wait for the device.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import library

from dgemma_ext import _C
from dgemma_ext.ops.plain import block_attention as block_attention_plain  # noqa: F401  registers the form for CUDA

__all__ = ["append_to_cache", "attention_workspace", "canvas_attention", "causal_attention"]


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
    """
    _check_attention(query, key, value, prefix_key, prefix_value, slot, prefix_length, length, window, scale)
    operands = (query, key, value, prefix_key, prefix_value, slot, prefix_length, length, window, scale)
    if out is None:
        result: torch.Tensor = torch.ops.dgemma.canvas_attention(*operands)
        return result
    workspace = _check_out(query, key, out, workspace)
    torch.ops.dgemma.canvas_attention.out(*operands, out=out, workspace=workspace)
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
    _check_attention(query, key, value, prefix_key, prefix_value, slot, prefix_length, length, window, scale)
    if spans is not None:
        _check_spans(spans, query)
    operands = (query, key, value, prefix_key, prefix_value, slot, prefix_length, length, spans, window, scale)
    if out is None:
        result: torch.Tensor = torch.ops.dgemma.causal_attention(*operands)
        return result
    workspace = _check_out(query, key, out, workspace)
    torch.ops.dgemma.causal_attention.out(*operands, out=out, workspace=workspace)
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
    _check_cache(key, value, prefix_key, prefix_value)
    _check_requests(key, slot, prefix_length, length)
    torch.ops.dgemma.append_to_cache(key, value, prefix_key, prefix_value, slot, prefix_length, length)


def attention_workspace(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """An uninitialised workspace for `canvas_attention` and `causal_attention` of these sizes."""
    batch, block, query_heads, head_dim = query.shape
    size = _C.block_attention_workspace(batch, block, query_heads, key.shape[2], head_dim, query.is_cuda)
    return torch.empty(size, dtype=torch.uint8, device=query.device)


def _refuse(name: str, got: str, want: str) -> NoReturn:
    raise ValueError(f"{name}: got {got}, wants {want}")


def _check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: str, device: torch.device
) -> None:
    if tensor.dtype != dtype:
        _refuse(name, str(tensor.dtype), f"{dtype}{like}")
    if tuple(tensor.shape) != shape:
        _refuse(name, f"shape {list(tensor.shape)}", f"{list(shape)}")
    if tensor.device != device:
        _refuse(name, f"device {tensor.device}", f"{device}")
    if not tensor.is_contiguous():
        _refuse(name, f"strides {list(tensor.stride())}", "a contiguous tensor")


def _check_numbers(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        _refuse(name, str(tensor.dtype), "torch.float32 or torch.bfloat16")
    if tensor.dim() != 4:
        _refuse(name, f"{tensor.dim()} dimensions", "4")


def _check_cache(key: torch.Tensor, value: torch.Tensor, prefix_key: torch.Tensor, prefix_value: torch.Tensor) -> None:
    _check_numbers("key", key)
    _check_numbers("prefix_key", prefix_key)
    batch, block, heads, head_dim = key.shape
    slots, capacity = prefix_key.shape[:2]
    if heads == 0 or head_dim == 0:
        _refuse("key", f"shape {list(key.shape)}", "at least one head of at least one dimension")
    for name, tensor, shape in (
        ("key", key, (batch, block, heads, head_dim)),
        ("value", value, (batch, block, heads, head_dim)),
        ("prefix_key", prefix_key, (slots, capacity, heads, head_dim)),
        ("prefix_value", prefix_value, (slots, capacity, heads, head_dim)),
    ):
        _check_tensor(name, tensor, shape, key.dtype, " like key", key.device)


def _check_requests(
    key: torch.Tensor, slot: torch.Tensor, prefix_length: torch.Tensor, length: torch.Tensor | None
) -> None:
    for name, tensor in (("slot", slot), ("prefix_length", prefix_length), ("length", length)):
        if tensor is not None:
            _check_tensor(name, tensor, (key.shape[0],), torch.int32, "", key.device)


def _check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    slot: torch.Tensor,
    prefix_length: torch.Tensor,
    length: torch.Tensor | None,
    window: int,
    scale: float,
) -> None:
    _check_cache(key, value, prefix_key, prefix_value)
    _check_numbers("query", query)
    batch, block, heads, head_dim = key.shape
    query_heads = query.shape[2]
    _check_tensor("query", query, (batch, block, query_heads, head_dim), key.dtype, " like key", key.device)
    if query_heads == 0 or query_heads % heads != 0:
        _refuse("query", f"{query_heads} heads", f"a multiple of the {heads} heads of key")
    if window < 0:
        _refuse("window", str(window), "0 (none) or more")
    if not math.isfinite(scale):
        _refuse("scale", str(scale), "a finite number")
    _check_requests(key, slot, prefix_length, length)


def _check_spans(spans: torch.Tensor, query: torch.Tensor) -> None:
    if spans.dim() != 3:
        _refuse("spans", f"{spans.dim()} dimensions", "3")
    _check_tensor("spans", spans, (query.shape[0], spans.shape[1], 2), torch.int32, "", query.device)


def _check_out(
    query: torch.Tensor, key: torch.Tensor, out: torch.Tensor, workspace: torch.Tensor | None
) -> torch.Tensor:
    """Checks both and gives the workspace, allocated where there is none."""
    _check_tensor("out", out, tuple(query.shape), query.dtype, " like query", query.device)
    if workspace is None:
        return attention_workspace(query, key)
    batch, block, query_heads, head_dim = query.shape
    bytes_wanted = _C.block_attention_workspace(batch, block, query_heads, key.shape[2], head_dim, query.is_cuda)
    if workspace.dim() != 1 or workspace.dtype != torch.uint8 or workspace.numel() < bytes_wanted:
        got = f"shape {list(workspace.shape)} of {workspace.dtype}"
        _refuse("workspace", got, f"one dimension of at least {bytes_wanted} torch.uint8")
    _check_tensor("workspace", workspace, (workspace.numel(),), torch.uint8, "", query.device)
    return workspace


def _fake_attention(query: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(query)


def _fake_in_place(*_: object, **__: object) -> None:
    return None


for _name in ("canvas_attention", "causal_attention"):
    library.register_fake(f"dgemma::{_name}", _fake_attention)
    library.register_fake(f"dgemma::{_name}.out", _fake_in_place)
library.register_fake("dgemma::append_to_cache", _fake_in_place)
