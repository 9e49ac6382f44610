"""Log-probabilities of a finished canvas, from the raw logits of its last step.

They are those of the step that gave the canvas's tokens: for each position the model's distribution given the whole
canvas as that step saw it, at temperature 1 and without masks of allowed tokens. They are marginals: their sum over a
canvas is no log-probability of its text, which a left-to-right model would give.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# As many alternatives as OpenAI's interface knows.
MAX_LOGPROBS = 20

# Logits that are converted to fp32 at once: 16 MiB of them, and twice as much for their order.
_CHUNK_ELEMENTS = 1 << 22


# What a request wants beside a token's own log-probability: how many of the most probable tokens, or which ones.
Alternatives = int | tuple[int, ...]


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a token of the answer, and the most probable tokens of its position, the best first, or
    the tokens that were asked for.

    A pinned token has log-probability 0 and no alternatives, because nothing was chosen there.
    """

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


def canvas_logprobs(
    logits: Tensor, softcap: float, tokens: Tensor, pinned: Tensor, wanted: Alternatives
) -> list[TokenLogprobs]:
    """The log-probabilities of the tokens of one canvas.

    logits: raw, [L, vocabulary]. softcap: 0 for none. tokens: integer [L]. pinned: bool [L]. wanted: how many
    alternatives, ordered by raw logit with ties to the lowest id; or their ids.
    """
    found = [TokenLogprobs(0.0)] * len(tokens)
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for places in pinned.logical_not().nonzero()[:, 0].split(rows):
        parts = _logprobs_of_rows(logits[places], softcap, tokens[places].long(), wanted)
        for place, one, ids, values in zip(places.tolist(), *(part.tolist() for part in parts), strict=True):
            found[place] = TokenLogprobs(one, tuple(ids), tuple(values))
    return found


def _logprobs_of_rows(
    logits: Tensor, softcap: float, tokens: Tensor, wanted: Alternatives
) -> tuple[Tensor, Tensor, Tensor]:
    raw = logits.float()
    if isinstance(wanted, tuple):
        ids = torch.tensor(wanted, device=logits.device).expand(len(raw), -1)
    else:
        ids = _most_probable(raw, min(wanted, logits.shape[-1]))
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    total = capped.logsumexp(-1, keepdim=True)
    chosen = capped.gather(-1, tokens[:, None]) - total
    return chosen[:, 0], ids, capped.gather(-1, ids) - total


def _most_probable(raw: Tensor, count: int) -> Tensor:
    """The ids of the largest of fp32 logits, ties to the lowest id."""
    # The order of fp32 numbers is that of these integers; -0 becomes 0. An id in the low half breaks ties.
    bits = (raw + 0.0).view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    order -= torch.arange(raw.shape[-1], device=raw.device)
    return order.topk(count, dim=-1).indices
