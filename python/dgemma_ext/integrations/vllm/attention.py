"""The part `attention`: a backend over vLLM's paged cache.

vLLM chooses a backend by name (`--attention-backend CUSTOM`) and on a CPU always CPU_ATTN, so `register` puts a class
of ours behind both names. The one for the CPU serves the layers of diffusion models that it knows and leaves all others
to vLLM's own, from which it is derived (attention_cpu.py).

A canvas on a sliding layer sees the same keys in every row: the last `window - 1` positions of the prefix and the whole
canvas, as under transformers. vLLM's own backends move the window with the row.

vLLM's cache is one tensor of a layer, [blocks, key heads, block size, 2 x head dim] whatever its layout in memory, keys
beside values; the operators take it by its strides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dgemma_ext.ops import block_attention

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

# By the names of vllm.v1.attention.backends.registry.AttentionBackendEnum.
BACKENDS = {
    "CUSTOM": "dgemma_ext.integrations.vllm.attention_backend.PagedAttentionBackend",
    "CPU_ATTN": "dgemma_ext.integrations.vllm.attention_cpu.PagedCpuAttentionBackend",
}
HEAD_SIZES = (16, 32, 64, 128, 256, 512)  # that the CUDA kernels take; a CPU's take any
DTYPES = (torch.float32, torch.bfloat16)  # of which the CUDA kernels take the second


def register() -> None:
    """Puts the backends behind their names; vLLM imports a class when a layer is made."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, path in BACKENDS.items():
        register_backend(AttentionBackendEnum[name], path)


@dataclass
class PagedBatch:
    """The requests of a step, as `paged_attention` has them. Tensors are int32, on the layers' device."""

    tokens: int  # rows of requests; what follows is padding
    max_query_length: int
    page_table: torch.Tensor  # [requests, blocks of a request]
    query_start: torch.Tensor  # [requests + 1]
    sequence_length: torch.Tensor  # [requests]
    causal: torch.Tensor  # [requests]; 0: a canvas

    @classmethod
    def of(cls, metadata: CommonAttentionMetadata) -> PagedBatch:
        """Of vLLM's metadata, whose `causal` is one answer for all or an int32 tensor."""
        requests = metadata.num_reqs
        causal = metadata.causal
        if not isinstance(causal, torch.Tensor):
            causal = torch.full_like(metadata.seq_lens[:requests], int(causal))
        return cls(
            tokens=metadata.num_actual_tokens,
            max_query_length=metadata.max_query_len,
            page_table=metadata.block_table_tensor[:requests],
            query_start=metadata.query_start_loc[: requests + 1],
            sequence_length=metadata.seq_lens[:requests],
            causal=causal[:requests],
        )


def pages_of(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer's cache as pages: [blocks, block size, key heads, head dim] each, views."""
    keys, values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return keys, values


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PagedBatch,
    window: int,
    scale: float,
    output: torch.Tensor,
) -> torch.Tensor:
    """Writes the attention of a step's rows; rows of padding stay. query and output [rows, query heads, head dim]."""
    keys, values = pages_of(kv_cache)
    block_attention.paged_attention(
        query[: batch.tokens].contiguous(),
        keys,
        values,
        batch.page_table,
        batch.query_start,
        batch.sequence_length,
        batch.causal,
        max_query_length=batch.max_query_length,
        window=window,
        scale=scale,
        out=output[: batch.tokens],
    )
    return output


def store(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Puts a step's keys and values, [rows, key heads, head dim], into the cache; slots of padding are -1."""
    rows = slot_mapping.shape[0]
    keys, values = pages_of(kv_cache)
    block_attention.append_to_pages(key[:rows].contiguous(), value[:rows].contiguous(), keys, values, slot_mapping)
