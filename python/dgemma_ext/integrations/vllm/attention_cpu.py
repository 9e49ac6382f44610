"""The attention backend CPU_ATTN, derived from vLLM's own.

vLLM takes CPU_ATTN for every model on a CPU. A layer is served by `paged_attention` where the model is a diffusion
model and nothing is asked of it that the kernels do not have; otherwise it is vLLM's own, to the letter.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from dgemma_ext.integrations.vllm.attention import DTYPES, PagedBatch, attend, store


class PagedCpuAttentionBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's, with other classes behind it."""

    @staticmethod
    def get_impl_cls() -> type[PagedCpuAttention]:
        return PagedCpuAttention

    @staticmethod
    def get_builder_cls() -> type[PagedCpuAttentionBuilder]:
        return PagedCpuAttentionBuilder


class PagedCpuAttentionBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """vLLM's metadata of a step, and beside it ours."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.paged_batch = PagedBatch.of(common_attn_metadata)
        return metadata


class PagedCpuAttention(CPUAttentionBackendImpl):  # type: ignore[misc]
    """A layer's attention. `is_paged`: by our kernels."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        config = get_current_vllm_config()
        self.is_paged = (
            config.model_config is not None
            and config.model_config.is_diffusion
            and config.model_config.dtype in DTYPES
            and self.attn_type == AttentionType.DECODER
            and self.alibi_slopes is None
            and self.sinks is None
            and not self.logits_soft_cap
            and not self.is_fp8_kv_cache
        )
        self.window = max(0, self.sliding_window)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.is_paged or attn_metadata is None:
            scales = (output_scale, output_block_scale)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        return attend(query, kv_cache, attn_metadata.paged_batch, self.window, self.scale, output)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if not self.is_paged:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        store(key, value, kv_cache, slot_mapping)
