"""Published speeds of DiffusionGemma 26B-A4B, each with its conditions and source.

"derived" says that the figure was computed from published ones, and how.

"""

from __future__ import annotations

from dataclasses import dataclass

_VLLM_BLOG = "vLLM blog, 2026-06-10, Diffusion Gemma, perf.svg"
_SGLANG = "SGLang PR 34061, benchmark README"
_DLM = "github.com/JunyuLiao/dlm, ledger"


@dataclass(frozen=True)
class Peer:
    """One published figure. `axis`: "tokens per second" against the batch, or "milliseconds per step" against the
    prefix; `steps`: fixed steps of a canvas, None where the sampler stops."""

    axis: str
    label: str
    at: int
    value: float
    conditions: str
    source: str
    steps: int | None = None


RATE, STEP = "tokens per second", "milliseconds per step"


def _curve(label: str, walls: dict[int, float], conditions: str) -> list[Peer]:
    """A curve from the median wall seconds of a batch of canvases of 256 tokens, 48 steps each."""
    source_conditions = f"{conditions}; derived: 256 tokens x batch / wall seconds"
    return [
        Peer(RATE, label, batch, 256 * batch / wall, source_conditions, _SGLANG, steps=48)
        for batch, wall in walls.items()
    ]


_TWO_H200 = "two H200, TP2, bf16, all 48 steps forced, prompt 128, 2026-09-09"

PEERS: tuple[Peer, ...] = (
    Peer(
        RATE,
        "vLLM, one H200, fp8",
        1,
        1288.0,
        "fixed 16 steps, prefill ignored, prompt length not stated, June build",
        _VLLM_BLOG,
        steps=16,
    ),
    Peer(
        RATE,
        "vLLM, one H100, fp8",
        1,
        1008.0,
        "fixed 16 steps, prefill ignored, prompt length not stated, June build",
        _VLLM_BLOG,
        steps=16,
    ),
    *_curve("vLLM 0.28.0, two H200, bf16", {1: 0.569, 4: 1.281, 8: 2.226}, _TWO_H200),
    *_curve("SGLang (sync), two H200, bf16", {1: 0.741, 4: 1.409, 8: 2.455}, _TWO_H200),
    Peer(
        RATE,
        "Google report, one H100, fp8",
        1,
        1456.0,
        "adaptive (about 12 steps), 4,096 tokens in, 1,024 out, prefill not counted; vLLM based",
        "arXiv 2608.00146, section 6",
    ),
    Peer(
        STEP,
        "Google report (vLLM), one H100, fp8",
        4096,
        13.56,
        "end to end, batch 1, mean of 7 benchmarks; about 84 experts a layer",
        "arXiv 2608.00146, section 6",
    ),
    *(
        Peer(STEP, "vLLM 0.30, one H100, bf16", prefix, value, "batch 1, real text", _DLM)
        for prefix, value in ((32_768, 29.1), (65_536, 40.5))
    ),
    *(
        Peer(STEP, "transformers compiled + FA4, one H100, bf16", prefix, value, "batch 1, real text", _DLM)
        for prefix, value in ((2048, 27.0), (35_840, 37.0), (73_728, 44.7))
    ),
)
