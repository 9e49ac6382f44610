"""What a function of `dgemma_ext.ops` costs above its operator: both with the same arguments, at sizes of almost no work.

    python bench/bench_ops.py                                                            a table
    python -m pytest -q -o python_files='bench_*.py' bench/bench_ops.py [-k attention]   as benchmarks

A table's rows: microseconds of the raw operator (torch.ops.dgemma.NAME), of the function, and their difference, each the
median of ROUNDS rounds that take turns. One thread, so that no thread is woken.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dgemma_ext.ops import block_attention, denoise, grouped_gemm, layer, quantized_gemm, router
from dgemma_ext.ops.formats import Fp8Weight, Int4Weight, QuantizedWeight
from dgemma_ext.ops.vocabulary_head import vocabulary_head

ROUNDS = 31
CALLS = 200
# Microseconds that a function may take above its operator.
MOST = 3.0

Call = Callable[[], Any]


def pairs() -> dict[str, tuple[Call, Call]]:
    """The raw operator and the function over it, by what is called."""
    made = {**_attention(), **_denoise(), **_products(), **_layer()}
    called = {name.partition(" ")[0] for name in made}
    assert called == _operators(), f"without a bench: {_operators() - called}"
    return made


def _operators() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("dgemma::") for name in names if name.startswith("dgemma::")}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _attention() -> dict[str, tuple[Call, Call]]:
    ops = torch.ops.dgemma
    query, key = torch.randn(1, 2, 2, 16), torch.randn(1, 2, 1, 16)
    cache = torch.zeros(1, 4, 1, 16)
    rows = (key, key, cache, cache.clone(), ints(0), ints(2), None)
    out, workspace = torch.empty_like(query), block_attention.attention_workspace(query, key)
    given = {"out": out, "workspace": workspace}
    canvas, causal = (query, *rows, 0, 1.0), (query, *rows, None, 0, 1.0)
    return {
        "canvas_attention": (
            lambda: ops.canvas_attention.default(*canvas),
            lambda: block_attention.canvas_attention(*canvas),
        ),
        "canvas_attention.out": (
            lambda: ops.canvas_attention.out(*canvas, **given),
            lambda: block_attention.canvas_attention(*canvas, **given),
        ),
        "causal_attention": (
            lambda: ops.causal_attention.default(*causal),
            lambda: block_attention.causal_attention(*causal),
        ),
        "causal_attention.out": (
            lambda: ops.causal_attention.out(*causal, **given),
            lambda: block_attention.causal_attention(*causal, **given),
        ),
        "append_to_cache": (
            lambda: ops.append_to_cache.default(*rows),
            lambda: block_attention.append_to_cache(*rows),
        ),
    }


def _denoise() -> dict[str, tuple[Call, Call]]:
    ops = torch.ops.dgemma
    logits, embedding, hidden = torch.randn(1, 1, 32), torch.randn(32, 8), torch.randn(1, 1, 8)
    params = (30.0, torch.ones(1), None, None, None)
    found = denoise.vocabulary_statistics(logits, *params)
    _, _, *softmax = found
    seed, zero, one = torch.zeros(1, dtype=torch.int64), ints(0), ints(1)
    draws = (seed, zero, one, None)
    token, flags = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.bool)
    inactive = torch.zeros(1, dtype=torch.bool)  # so that every call finds the same
    wide = torch.ones(1, dtype=torch.float64)
    update = (
        *(token, token, torch.ones(1, 1), None, None, None, None, 32, seed, zero, ints(4), wide, wide, torch.ones(1)),
        *(one, torch.ones(1), inactive, token.clone(), token.clone(), zero.clone(), one.clone(), torch.ones(1)),
        *(flags, torch.ones(1), zero.clone()),
    )
    noise = (token.clone(), 32, 0, seed, zero, one, None, None, None, None, None)
    soft = (logits, *params, *softmax, None, embedding, 1.0, 0.0, 9.0)
    out = torch.empty(1, 1, 8)
    workspace = torch.empty(denoise.soft_embedding_workspace(1, 1, 32, 8), dtype=torch.uint8)
    given, named = {"out": out, "workspace": workspace}, found._asdict()
    return {
        "vocabulary_statistics": (
            lambda: ops.vocabulary_statistics.default(logits, *params),
            lambda: denoise.vocabulary_statistics(logits, *params),
        ),
        "vocabulary_statistics.out": (
            lambda: ops.vocabulary_statistics.out(logits, *params, **named),
            lambda: denoise.vocabulary_statistics(logits, *params, out=found),
        ),
        "sample": (
            lambda: ops.sample.default(logits, *params, *softmax, *draws),
            lambda: denoise.sample(logits, *params, *softmax, *draws),
        ),
        "sample.out": (
            lambda: ops.sample.out(logits, *params, *softmax, *draws, out=token),
            lambda: denoise.sample(logits, *params, *softmax, *draws, out=token),
        ),
        "noise_": (lambda: ops.noise_.default(*noise), lambda: denoise.noise_(*noise)),
        "update_canvas_": (lambda: ops.update_canvas_.default(*update), lambda: denoise.update_canvas_(*update)),
        "soft_embedding": (lambda: ops.soft_embedding.default(*soft), lambda: denoise.soft_embedding(*soft)),
        "soft_embedding.out": (
            lambda: ops.soft_embedding.out(*soft, **given),
            lambda: denoise.soft_embedding(*soft, **given),
        ),
        "vocabulary_head": (
            lambda: ops.vocabulary_head.default(hidden, embedding, *params, logits, *found),
            lambda: vocabulary_head(hidden, embedding, *params, logits=logits, out=found),
        ),
    }


def _products() -> dict[str, tuple[Call, Call]]:
    ops = torch.ops.dgemma
    input, gate_up, down = torch.randn(1, 32), torch.randn(1, 64, 32), torch.randn(1, 32, 32)
    tokens = (input, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    experts, weight = (*tokens, gate_up, down), torch.randn(8, 32)
    given = {
        "out": torch.empty_like(input),
        "workspace": torch.empty(grouped_gemm.moe_ffn_workspace(*experts), dtype=torch.uint8),
    }
    fp8 = [Fp8Weight.quantize(matrix) for matrix in (gate_up, down)]
    int4 = [Int4Weight.quantize(matrix, 32) for matrix in (gate_up, down)]
    codes = [part for matrix in fp8 for part in (matrix.values, matrix.scales)]
    narrow = Int4Weight.quantize(weight, 32)
    routing = (input, torch.ones(32), torch.randn(4, 32), torch.ones(4), 2, 1e-6)
    parts = [part for matrix in int4 for part in int4_parts(matrix)]
    return {
        "moe_ffn": (lambda: ops.moe_ffn.default(*experts), lambda: grouped_gemm.moe_ffn(*experts)),
        "moe_ffn.out": (
            lambda: ops.moe_ffn.out(*experts, **given),
            lambda: grouped_gemm.moe_ffn(*experts, **given),
        ),
        "dense": (lambda: ops.dense.default(input, weight), lambda: grouped_gemm.dense(input, weight)),
        "moe_ffn_quantized": (
            lambda: ops.moe_ffn_quantized.default(*tokens, *parts),
            lambda: quantized_gemm.moe_ffn(*tokens, *int4),
        ),
        "moe_ffn_fp8": (
            lambda: ops.moe_ffn_fp8.default(*tokens, *codes),
            lambda: quantized_gemm.moe_ffn_fp8(*tokens, *fp8),
        ),
        "dense_quantized": (
            lambda: ops.dense_quantized.default(input, *int4_parts(narrow)),
            lambda: quantized_gemm.dense(input, narrow),
        ),
        "route": (lambda: ops.route.default(*routing), lambda: router.route(*routing)),
    }


def int4_parts(weight: QuantizedWeight) -> tuple[Any, ...]:
    return 2, weight.values, weight.kernel_scales, None


def _layer() -> dict[str, tuple[Call, Call]]:
    ops = torch.ops.dgemma
    rows, weight, heads = torch.randn(1, 8), torch.ones(8), torch.randn(1, 1, 8)
    normalise = (heads, heads, None, weight, weight, rows, rows, 1e-6)
    residual = (rows, rows, weight, weight, weight, 1e-6)
    output = (rows, rows, rows, weight, weight, weight, weight, 1.0, 1e-6)
    return {
        "normalise_heads": (
            lambda: ops.normalise_heads.default(*normalise),
            lambda: layer.normalise_heads(*normalise),
        ),
        "attention_residual": (
            lambda: ops.attention_residual.default(*residual),
            lambda: layer.attention_residual(*residual),
        ),
        "gelu_product": (lambda: ops.gelu_product.default(rows, rows), lambda: layer.gelu_product(rows, rows)),
        "layer_output": (lambda: ops.layer_output.default(*output), lambda: layer.layer_output(*output)),
    }


PAIRS = pairs()


def microseconds(call: Call) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS * 1e6


def measure(raw: Call, function: Call) -> tuple[float, float, float]:
    """Medians of the raw operator, of the function, and of the differences between turns."""
    times = [(microseconds(raw), microseconds(function)) for _ in range(ROUNDS)]
    differences = [after - before for before, after in times]
    raws, functions = zip(*times, strict=True)
    return statistics.median(raws), statistics.median(functions), statistics.median(differences)


@pytest.mark.parametrize("name", PAIRS)
def test_wrapper(name: str, benchmark: Any) -> None:
    torch.set_num_threads(1)
    raw, function = PAIRS[name]
    before, after, above = measure(raw, function)
    benchmark.extra_info |= {"raw_us": round(before, 2), "function_us": round(after, 2), "above_us": round(above, 2)}
    benchmark(function)
    assert above <= MOST


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'operator':28}{'raw us':>10}{'function us':>14}{'above us':>10}")
    for name, (raw, function) in PAIRS.items():
        before, after, above = measure(raw, function)
        print(f"{name:28}{before:10.2f}{after:14.2f}{above:10.2f}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
