"""Arguments of the C interface's products, attention and quantizing on the CPU, as c_operations.py has the others."""

from __future__ import annotations

from typing import Any

import torch

from c_operations import int32, tensor, zeros


def quantized_matrix(format: str, matrices: int, rows: int, columns: int) -> dict[str, Any]:
    """A dgemma_quantized of e4m3 ("fp8"), of 4 bits in groups of 32 ("int4"), of e2m1 ("nvfp4") or of "int8": all its
    values 0."""
    number, group, bits, scale = {
        "fp8": (1, 0, 8, None),
        "int4": (2, 32, 4, torch.bfloat16),
        "nvfp4": (3, 16, 4, torch.uint8),
        "int8": (4, 0, 8, None),
    }[format]
    return {
        "format": number,
        "group": group,
        "values": zeros(torch.uint8, matrices, rows, columns * bits // 8),
        "scales": None if scale is None else zeros(scale, matrices, rows, -(-columns // group)),
        "scale_dtype": torch.bfloat16,
        "factors": torch.ones(matrices * rows // 4),
        "rows_per_factor": 4,
    }


def product_operations(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Arguments of every struct of grouped_gemm.h without the router's, and of block_attention.h."""
    tokens, hidden, expert, experts, top_k = 4, 32, 16, 3, 2
    batch, length, heads, key_heads, width, slots, capacity = 2, 4, 2, 1, 16, 2, 8
    block = (batch, length, key_heads, width)
    stored = (slots, capacity, key_heads, width)
    cache = {
        "batch": batch,
        "block_length": length,
        "key_heads": key_heads,
        "head_dim": width,
        "slots": slots,
        "capacity": capacity,
        "dtype": dtype,
        "key": tensor(dtype, *block),
        "value": tensor(dtype, *block),
        "prefix_key": tensor(dtype, *stored),
        "prefix_value": tensor(dtype, *stored),
        "slot": int32(1, 0),
        "prefix_length": int32(3, 0),
    }
    ffn = {
        "tokens": tokens,
        "hidden_size": hidden,
        "expert_size": expert,
        "experts": experts,
        "top_k": top_k,
        "dtype": dtype,
        "input": tensor(dtype, tokens, hidden),
        "expert_ids": torch.randint(experts, (tokens, top_k), dtype=torch.int32),
        "expert_weights": torch.rand(tokens, top_k),
        "output": zeros(dtype, tokens, hidden),
    }
    dense = {
        "rows": tokens,
        "in_features": hidden,
        "out_features": expert,
        "dtype": dtype,
        "input": tensor(dtype, tokens, hidden),
        "output": zeros(dtype, tokens, expert),
    }
    return {
        "moe_ffn": {
            **ffn,
            "gate_up": tensor(dtype, experts, 2 * expert, hidden),
            "down": tensor(dtype, experts, hidden, expert),
        },
        "moe_ffn_quantized": {
            "ffn": ffn,
            "gate_up": quantized_matrix("int4", experts, 2 * expert, hidden),
            "down": quantized_matrix("fp8", experts, hidden, expert),
        },
        "dense": {**dense, "weight": tensor(dtype, expert, hidden)},
        "dense_quantized": {"dense": dense, "weight": quantized_matrix("nvfp4", 1, expert, hidden)},
        "append_to_cache": cache,
        "block_attention": {
            **cache,
            "query_heads": heads,
            "window": 5,
            "scale": 1.0,
            "query": tensor(dtype, batch, length, heads, width),
            "output": zeros(dtype, batch, length, heads, width),
        },
        **page_operations(dtype),
    }


def page_operations(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Arguments of the structs of block_attention.h that have pages."""
    pages, size, heads, width, tokens = 4, 2, 1, 16, 3
    strides = {"page_stride": size * heads * width, "row_stride": heads * width, "head_stride": width}
    pool = {
        "tokens": tokens,
        "key_heads": heads,
        "head_dim": width,
        "pages": pages,
        "page_size": size,
        **{f"{which}_{name}": stride for which in ("key", "value") for name, stride in strides.items()},
        "dtype": dtype,
        "key_pages": tensor(dtype, pages, size, heads, width),
        "value_pages": tensor(dtype, pages, size, heads, width),
    }
    return {
        "paged_attention": {
            **pool,
            "requests": 2,
            "max_query_length": 2,
            "query_heads": 2,
            "pages_per_request": 2,
            "window": 5,
            "scale": 1.0,
            "query": tensor(dtype, tokens, 2, width),
            "page_table": int32(2, 0, 3, 1),
            "query_start": int32(0, 2, 3),
            "sequence_length": int32(3, 4),
            "causal": int32(1, 0),
            "output": zeros(dtype, tokens, 2, width),
        },
        "append_to_pages": {
            **pool,
            "key": tensor(dtype, tokens, heads, width),
            "value": tensor(dtype, tokens, heads, width),
            "slot": torch.tensor([5, -1, 0]),
        },
    }


def quantize_operations(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Arguments of the struct of quantize.h."""
    rows, columns, groups = 5, 96, 3
    return {
        "quantize_weight": {
            "rows": rows,
            "columns": columns,
            "groups": groups,
            "row_bytes": columns // 2,
            "format": 2,
            "multiplier": 1.0,
            "dtype": dtype,
            "weight": tensor(dtype, rows, columns),
            "importance": torch.rand(columns),
            "values": zeros(torch.uint8, rows, columns // 2),
            "scales": torch.zeros(rows, groups),
            "errors": zeros(torch.float64, rows, 3),
        }
    }
