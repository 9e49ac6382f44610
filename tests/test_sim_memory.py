"""The test bed watches the memory of torch's tensors under the operators: their ends, and races between blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sim.build import ROOT, SUPPORTED
from sim.extension import run_on_kernels

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    return json.loads(run_on_kernels(Path(__file__).parent / "faults_in_tensors.py", watch=True))


def line_of(statement: str) -> str:
    """The line of append_to_cache.cu with this statement, as "append_to_cache.cu:12"."""
    path = ROOT / "csrc" / "block_attention" / "cuda" / "append_to_cache.cu"
    (number,) = (n for n, line in enumerate(path.read_text().splitlines(), 1) if statement in line)
    return f"{path.name}:{number}"


def test_a_call_that_keeps_the_rules_is_not_reported(said: dict[str, str]) -> None:
    assert said["right"] == ""


def test_a_store_behind_a_tensor_is_reported(said: dict[str, str]) -> None:
    """The cache lacks its last 16 bytes: the last row's thread stores them behind it."""
    place = re.escape(line_of("p.prefix_key[stored * p.pieces + piece] ="))
    assert re.fullmatch(
        rf"dgemma::append_to_cache failed: kernel append_to_cache, block \(0, 0, 0\) thread 31, {place}: "
        r"this thread writes 16 bytes at byte 3056 of a tensor's memory of 3056 bytes",
        said["short"],
    ), said["short"]


def test_a_race_between_two_requests_is_reported(said: dict[str, str]) -> None:
    """Both append to one slot, each its own keys. The report is longer than the C interface's message has room for."""
    place = re.escape(line_of("p.prefix_key[stored * p.pieces + piece] ="))
    assert re.fullmatch(
        rf"dgemma::append_to_cache failed: kernel append_to_cache, block \(0, [01], 0\) thread \d+, {place}: "
        r"race: this thread writes global memory at \d+ \(byte \d+ of a tensor's memory of 3072 bytes\), "
        rf"which thread \d+ of block \(0, [01], 0\) wrote \({place}\), and neither comes first",
        said["the same slot"],
    ), said["the same slot"]
    assert len(said["the same slot"]) > len("dgemma::append_to_cache failed: ") + 256
