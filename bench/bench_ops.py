"""What a function of `dgemma_ext.ops` costs above its operator: both with the same arguments, at sizes of little work.

    python bench/bench_ops.py                                                           a table
    python -m pytest -q -o python_files='bench_*.py' bench/bench_ops.py [-k attention]  as benchmarks

Rows of the table: microseconds of the raw operator (torch.ops.dgemma.NAME), of the function, and their difference, each
the median of ROUNDS rounds in which both take turns. One thread, so that no other is woken.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from operator_calls import OperatorCall, calls

ROUNDS = 41
CALLS = 100
# Microseconds that a function may take above its operator.
MOST = 3.0

CASES = calls(torch.float32)


def microseconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS * 1e6


def measure(case: OperatorCall) -> tuple[float, float, float]:
    """Medians of the raw operator, of the function, and of the differences between turns."""

    def raw() -> None:
        case.operator(*case.arguments, **case.keywords)

    def function() -> None:
        case.function(*case.given, **case.function_keywords)

    times = [(microseconds(raw), microseconds(function)) for _ in range(ROUNDS)]
    differences = [above - below for below, above in times]
    raws, functions = zip(*times, strict=True)
    return statistics.median(raws), statistics.median(functions), statistics.median(differences)


@pytest.mark.parametrize("name", CASES)
def test_function_above_its_operator(name: str, benchmark: Any) -> None:
    torch.set_num_threads(1)
    raw, function, above = measure(CASES[name])
    benchmark.extra_info |= {"raw_us": round(raw, 2), "function_us": round(function, 2), "above_us": round(above, 2)}
    benchmark(CASES[name].wrapped)
    assert above <= MOST


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'operator':28}{'raw us':>10}{'function us':>14}{'above us':>10}")
    for name, case in CASES.items():
        raw, function, above = measure(case)
        print(f"{name:28}{raw:10.2f}{function:14.2f}{above:10.2f}", flush=True)


if __name__ == "__main__":
    main()
