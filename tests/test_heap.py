"""The memory of freed tensors stays with the process, as the number of page faults shows."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dgemma_ext import heap

PROGRAM = """
import resource
import dgemma_ext
import torch
from dgemma_ext.ops import layer

rows = torch.ones(256, 2816, dtype=torch.bfloat16)

def step():
    layer.attention_residual(rows, rows, rows[0], rows[0], rows[0], 1e-6)

for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)
"""


def faults() -> int:
    """Page faults of one operator whose results are 1,056 pages of 4 KiB."""
    clean = {name: value for name, value in os.environ.items() if name not in heap._SETTINGS}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another C library than GNU's")
def test_results_take_the_memory_of_those_before() -> None:
    assert faults() < 200  # 1,059 without heap.py


@pytest.mark.parametrize("name", heap._SETTINGS)
def test_the_users_own_setting_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "131072")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: pytest.fail("the C library was asked"))
    assert not heap.keep_freed_memory()


def test_a_c_library_without_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in heap._SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    assert not heap.keep_freed_memory()
