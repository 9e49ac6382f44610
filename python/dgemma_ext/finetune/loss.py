"""The losses of a batch: encode once, denoise without gradients where self-conditioning asks for it, denoise again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext.finetune.forward import Passes, Prefix
from dgemma_ext.finetune.recipe import Batch
from dgemma_ext.model import Network
from dgemma_ext.ops import denoise
from dgemma_ext.ops.gradients import head_cross_entropy
from dgemma_ext.sampling.step import softmax_statistics


@dataclass(frozen=True)
class Losses:
    """Weighted sums of cross-entropies in nats, float32 scalars: over the canvases, and over next tokens (0 where these
    do not count)."""

    canvas: Tensor
    encoder: Tensor


def losses(passes: Passes, batch: Batch) -> Losses:
    """The losses of a batch that lies on the network's device."""
    network = passes.network
    table, softcap = network.weights.embed_tokens, network.config.final_logit_softcapping
    counts_next = bool(batch.next_weights.any())
    prefix, encoded = passes.encode(batch.ids, needs_output=counts_next)
    encoder = torch.zeros((), dtype=torch.float32, device=batch.ids.device)
    if encoded is not None:
        following = functional.pad(batch.ids[:, 1:], (0, 1))
        encoder = head_cross_entropy(
            encoded.flatten(0, 1), table, following.reshape(-1), batch.next_weights.reshape(-1), softcap
        )
    soft = first_pass(passes, batch, prefix)
    hidden = passes.denoise(batch.canvas, prefix, batch.lengths, soft)
    canvas = head_cross_entropy(
        hidden.flatten(0, 1), table, batch.targets.reshape(-1), batch.weights.reshape(-1), softcap
    )
    return Losses(canvas, encoder)


@torch.no_grad()
def first_pass(passes: Passes, batch: Batch, prefix: Prefix) -> Tensor | None:
    """The soft embeddings [B, L, hidden] of a pass without self-conditioning, exact zero in rows that have none; None
    where no row has one. The pass has the rows that need it alone."""
    chosen = batch.conditioned.nonzero()[:, 0]
    if len(chosen) == 0:
        return None
    hidden = passes.denoise(batch.canvas[chosen], prefix.rows(chosen), batch.lengths[chosen], None)
    soft = torch.zeros((*batch.canvas.shape, hidden.shape[-1]), dtype=hidden.dtype, device=hidden.device)
    for row, one in zip(chosen.tolist(), hidden.split(1), strict=True):
        soft[row] = soft_embedding(passes.network, one)[0]
    return soft


def soft_embedding(network: Network, hidden: Tensor) -> Tensor:
    """The expected embedding under the head's distribution at temperature 1, for the head's input [1, L, hidden]."""
    raw = functional.linear(hidden, network.weights.embed_tokens)
    temperature = torch.ones(1, dtype=torch.float32, device=raw.device)
    softcap = network.config.final_logit_softcapping
    statistics = denoise.vocabulary_statistics(raw, softcap, temperature)
    return denoise.soft_embedding(
        raw,
        softcap=softcap,
        temperature=temperature,
        active=None,
        allowed=None,
        allowed_row=None,
        **softmax_statistics(statistics),
        pinned=None,
        embedding=network.weights.embed_tokens,
        embedding_scale=network.embedding_scale,
        tolerance=network.soft_embedding_tolerance,
        max_embedding_norm=network.max_embedding_norm,
    )
