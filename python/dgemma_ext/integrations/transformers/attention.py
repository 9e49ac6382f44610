"""Attention of transformers' DiffusionGemma by `ops.block_attention`.

transformers passes keys and values of the cache and of the new positions in one tensor, and a mask; visibility.py finds
the kernels' prefix and block in them. The keys are rotated already, so only their order counts, not their positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modeling

from dgemma_ext.integrations.transformers.fallback import acceleration_of, needs_gradient, tensors_refused
from dgemma_ext.integrations.transformers.visibility import Keys, Row, Visibility, of_mask, without_mask
from dgemma_ext.ops import block_attention, gradients

# Head dimensions of the CUDA kernels; csrc/block_attention/cuda/plan.cpp.
_CUDA_HEAD_DIMS = (16, 32, 64, 128, 256, 512)
# Arguments of other models' attention, which the kernels do not support.
_UNKNOWN_ARGUMENTS = ("softcap", "position_bias", "cache", "s_aux")


def register(name: str) -> None:
    """Registers the attention and its mask function: an implementation without one silently gets no mask."""
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_classes() -> tuple[type[nn.Module], ...]:
    return modeling.DiffusionGemmaEncoderTextAttention, modeling.DiffusionGemmaDecoderTextAttention


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers' AttentionInterface: query [batch, heads, queries, head dim], key and value
    [batch, key heads, keys, head dim]; returns [batch, queries, heads, head dim]."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    visibility: Visibility | None = None
    if torch.compiler.is_compiling():
        reason: str | None = None  # a warning would break the graph; denoising.py has given it
    elif kwargs.get("output_attentions"):
        acceleration_of(module).fall_back("attention", "output_attentions wants its weights, which no kernel stores")
        mask = _additive(attention_mask, query, key, causal)
        keywords = {"dropout": dropout, "scaling": scaling, **kwargs}
        eager: tuple[Tensor, Tensor] = modeling.eager_attention_forward(module, query, key, value, mask, **keywords)
        return eager
    else:
        reason = _refused(query, key, value, dropout, kwargs)
        if reason is None:
            visibility = _visibility(attention_mask, query, key, sliding_window, causal)
            if visibility is None:
                reason = (
                    "its mask is neither causal (padded, with spans or without) nor the same for all queries of a row"
                )
        if reason is not None:
            acceleration_of(module).fall_back("attention", reason)
    if visibility is None:
        keywords = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        sdpa: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
        return sdpa
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _attend(visibility, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale), None


def _refused(query: Tensor, key: Tensor, value: Tensor, dropout: float, arguments: dict[str, Any]) -> str | None:
    if dropout > 0.0:
        return "dropout is on"
    unknown = [name for name in _UNKNOWN_ARGUMENTS if arguments.get(name) is not None]
    if unknown:
        return f"no kernel knows {', '.join(unknown)}"
    if query.is_cuda and query.shape[-1] not in _CUDA_HEAD_DIMS:
        return f"no kernel of cuda takes a head dim of {query.shape[-1]}"
    return tensors_refused(query, key, value)


def _visibility(
    mask: Tensor | None, query: Tensor, key: Tensor, sliding_window: int | None, causal: bool
) -> Visibility | None:
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        return without_mask(queries, keys, causal)
    found = of_mask(mask, queries, keys, sliding_window or 0)
    return found if mask.shape[0] in (1, query.shape[0]) else None


def _attend(visibility: Visibility, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query, key, value [batch, positions, heads, head dim], in any layout; a call for all rows, or one for each."""
    if len(visibility.rows) == 1:
        return _attend_rows(visibility, visibility.rows[0], query, key, value, scale)
    parts = [
        _attend_rows(visibility, row, query[b : b + 1], key[b : b + 1], value[b : b + 1], scale)
        for b, row in enumerate(visibility.rows)
    ]
    return torch.cat(parts)


def _attend_rows(
    visibility: Visibility, row: Row | None, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Attention of rows that see the same keys; zero for queries that see nothing."""
    if row is None:
        return query.new_zeros(query.shape)
    batch, prefix = query.shape[0], _chosen(key, row.prefix)
    operands = (
        query[:, row.queries].contiguous(),
        _chosen(key, row.block),
        _chosen(value, row.block),
        prefix,
        _chosen(value, row.prefix),
        torch.arange(batch, dtype=torch.int32, device=query.device),
        torch.full((batch,), prefix.shape[1], dtype=torch.int32, device=query.device),
    )
    form: Any = gradients if needs_gradient(*operands) else block_attention
    if visibility.causal:
        spans = None
        if row.spans:
            spans = torch.tensor(row.spans, dtype=torch.int32, device=query.device).expand(batch, -1, -1).contiguous()
        found = form.causal_attention(*operands, spans=spans, window=visibility.window, scale=scale)
    else:
        found = form.canvas_attention(*operands, scale=scale)
    if found.shape[1] == query.shape[1]:
        return found
    out = query.new_zeros(query.shape)
    out[:, row.queries] = found
    return out


def _chosen(tensor: Tensor, keys: Keys) -> Tensor:
    """The chosen keys of [batch, keys, heads, head dim], contiguous."""
    return tensor[:, keys].contiguous()


def _additive(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """The additive mask of transformers' eager attention, which is added to the scores."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and causal and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
