"""The operators of the denoise step beside torch's operators in transformers, in the same run.

    cd bench && python -m pytest bench_denoise.py -o python_files='bench_*.py'

extra_info: the peer's milliseconds, the ratio of the medians (ours / peer's), and our GB/s or GFLOP/s. A CPU time
means something only beside the peer's.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dgemma_ext.ops import denoise

# One canvas of the published model; DENOISE_ROWS and DENOISE_VOCABULARY make it smaller.
ROWS = int(os.environ.get("DENOISE_ROWS", "256"))
VOCABULARY = int(os.environ.get("DENOISE_VOCABULARY", "262144"))
HIDDEN = 2816
SOFTCAP = 30.0
TEMPERATURE = 0.6
TOLERANCE = 2.0**-9
ROUNDS = 3

Benchmark = Any


def median_seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def compare(benchmark: Benchmark, ours: Callable[[], object], peer: Callable[[], object], **work: float) -> None:
    """Times both. `work`: gigabytes= or gigaflop= of one call of ours."""
    peer_seconds = median_seconds(peer)
    benchmark.pedantic(ours, rounds=ROUNDS, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        peer="torch",
        ours_ms=round(seconds * 1e3, 3),
        peer_ms=round(peer_seconds * 1e3, 3),
        ratio=round(seconds / peer_seconds, 4),
    )
    for unit, amount in work.items():
        benchmark.extra_info[f"{unit}_per_s"] = round(amount / seconds, 2)


@pytest.fixture(scope="module", params=["flat", "peaked"])
def logits(request: pytest.FixtureRequest) -> torch.Tensor:
    torch.manual_seed(0)
    raw = (torch.randn(1, ROWS, VOCABULARY) * 3).bfloat16()
    if request.param == "peaked":
        raw[0, torch.arange(ROWS), torch.randint(0, VOCABULARY, (ROWS,))] = 40.0
    return raw


def logits_params(raw: torch.Tensor) -> dict[str, Any]:
    nothing = {"active": None, "allowed": None, "allowed_row": None}
    return {"logits": raw, "softcap": SOFTCAP, "temperature": torch.tensor([TEMPERATURE]), **nothing}


def softmax_statistics(raw: torch.Tensor) -> dict[str, torch.Tensor]:
    found = denoise.vocabulary_statistics(**logits_params(raw))._asdict()
    return {name: found[name] for name in ("row_max", "row_sum", "tile_max", "tile_sum")}


def processed(raw: torch.Tensor) -> torch.Tensor:
    """The head's soft cap and the temperature, as transformers applies them."""
    z = raw.to(torch.float32) / SOFTCAP
    return torch.tanh(z) * SOFTCAP / TEMPERATURE


def draws() -> dict[str, torch.Tensor]:
    one = torch.ones(1, dtype=torch.int32)
    return {"seed": torch.ones(1, dtype=torch.int64), "canvas_index": one, "step": one}


def test_statistics(benchmark: Benchmark, logits: torch.Tensor) -> None:
    """Beside soft cap, temperature, argmax, and the entropy twice (acceptance and stopping each compute it)."""

    def peer() -> None:
        z = processed(logits)
        z.argmax(-1)
        for _ in range(2):
            torch.distributions.Categorical(logits=z).entropy()

    arguments = logits_params(logits)
    gigabytes = logits.numel() * 2 / 1e9
    compare(benchmark, lambda: denoise.vocabulary_statistics(**arguments), peer, gigabytes=gigabytes)


def test_sample(benchmark: Benchmark, logits: torch.Tensor) -> None:
    """Beside softmax and multinomial."""
    z = processed(logits)[0]
    arguments = {**logits_params(logits), **softmax_statistics(logits), **draws()}
    compare(
        benchmark,
        lambda: denoise.sample(**arguments),
        lambda: torch.multinomial(torch.softmax(z, dim=-1, dtype=torch.float32), num_samples=1),
    )


@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
def test_soft_embedding(benchmark: Benchmark, logits: torch.Tensor, tolerance: float) -> None:
    """Beside the cast, softmax to bf16 and the product with the embedding."""
    torch.manual_seed(1)
    embedding = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
    z = processed(logits)
    scale = torch.tensor(53.0, dtype=torch.bfloat16)

    def peer() -> torch.Tensor:
        p = z.to(torch.bfloat16).softmax(dim=-1, dtype=torch.float32).to(torch.bfloat16)
        return torch.matmul(p, embedding) * scale

    arguments = {
        **logits_params(logits),
        **softmax_statistics(logits),
        "pinned": None,
        "embedding": embedding,
        "embedding_scale": 53.0,
        "tolerance": tolerance,
        "max_embedding_norm": float(embedding.float().norm(dim=-1).max()),
    }
    gigaflop = 2.0 * ROWS * VOCABULARY * HIDDEN / 1e9
    compare(benchmark, lambda: denoise.soft_embedding(**arguments), peer, dense_gigaflop=gigaflop)


def test_update(benchmark: Benchmark) -> None:
    """Beside sort, cumulative sum, scatter and a fresh random canvas."""
    vocabulary = VOCABULARY
    tokens = torch.randint(0, vocabulary, (1, ROWS), dtype=torch.int32)
    entropy = torch.rand(1, ROWS) * 0.01

    def one(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((1,), value, dtype=dtype)

    def ours() -> None:
        denoise.update_canvas_(
            *(tokens, tokens, entropy, None, None, None, None, vocabulary),
            *(one(1, torch.int64), one(0, torch.int32), one(48, torch.int32)),
            *(one(0.4, torch.float64), one(0.8, torch.float64), one(0.1, torch.float32)),
            *(one(1, torch.int32), one(0.005, torch.float32), one(1, torch.bool)),
            *(tokens.clone(), tokens.clone(), one(0, torch.int32), one(1, torch.int32), one(0.8, torch.float32)),
            *(torch.zeros(1, ROWS, dtype=torch.bool), one(0, torch.float32), one(0, torch.int32)),
        )

    def peer() -> None:
        ordered, order = torch.sort(entropy, dim=-1)
        chosen = torch.cumsum(ordered, dim=-1) - ordered <= 0.1
        accepted = torch.scatter(torch.zeros_like(chosen), -1, order, chosen)
        canvas = torch.where(accepted, tokens, tokens)
        torch.where(~accepted, torch.randint(0, vocabulary, (1, ROWS), dtype=torch.int32), canvas)
        _ = bool((tokens == tokens).all()) and float(entropy.mean()) < 0.005

    compare(benchmark, ours, peer)
