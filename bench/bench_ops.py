"""What a function of `dgemma_ext.ops` costs above its operator: both with the same arguments, at sizes of little work.

    python bench/bench_ops.py                                                           a table
    python -m pytest -q -o python_files='bench_*.py' bench/bench_ops.py [-k attention]  as benchmarks

Rows of the table: microseconds of the raw operator (torch.ops.dgemma.NAME), of the function, and their difference, by
the medians of CALLS calls in turn. One thread, so that no other is woken.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from operator_calls import OperatorCall, calls

CALLS = 3000
# Microseconds that a function may take above its operator.
MOST = 3.0

CASES = calls(torch.float32)


def measure(case: OperatorCall) -> tuple[float, float, float]:
    """Medians of the raw operator and of the function, and their difference.

    Both are called by turns, one call each: on a machine that others use whole rounds drift apart by more than the
    function costs.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(CALLS):
        begin = time.perf_counter()
        case.operator(*case.arguments, **case.keywords)
        between = time.perf_counter()
        case.function(*case.given, **case.function_keywords)
        times[0].append(between - begin)
        times[1].append(time.perf_counter() - between)
    raw, function = (1e6 * statistics.median(each) for each in times)
    return raw, function, function - raw


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
