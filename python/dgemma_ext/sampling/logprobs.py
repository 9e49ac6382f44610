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


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a token of the answer, and the most probable tokens of its position, the best first.

    A pinned token has log-probability 0 and no alternatives, because nothing was chosen there.
    """

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


def canvas_logprobs(logits: Tensor, softcap: float, tokens: Tensor, pinned: Tensor, top: int) -> list[TokenLogprobs]:
    """The log-probabilities of the tokens of one canvas.

    logits: raw, [L, vocabulary]. softcap: 0 for none. tokens: integer [L]. pinned: bool [L]. top: how many
    alternatives, ordered by raw logit with ties to the lowest id.
    """
    top = min(top, logits.shape[-1])
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    parts = [
        _logprobs_of_rows(chunk, softcap, chosen.long(), top)
        for chunk, chosen in zip(logits.split(rows), tokens.split(rows), strict=True)
    ]
    chosen, ids, best = (torch.cat(each).tolist() for each in zip(*parts, strict=True))
    return [
        TokenLogprobs(0.0) if given else TokenLogprobs(one, tuple(top_ids), tuple(top_values))
        for one, top_ids, top_values, given in zip(chosen, ids, best, pinned.tolist(), strict=True)
    ]


def _logprobs_of_rows(logits: Tensor, softcap: float, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    raw = logits.float()
    # The order of fp32 numbers is that of these integers; -0 becomes 0. An id in the low half breaks ties.
    bits = (raw + 0.0).view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    order -= torch.arange(logits.shape[-1], device=logits.device)
    ids = order.topk(top, dim=-1).indices
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    total = capped.logsumexp(-1, keepdim=True)
    chosen = capped.gather(-1, tokens[:, None]) - total
    return chosen[:, 0], ids, capped.gather(-1, ids) - total
