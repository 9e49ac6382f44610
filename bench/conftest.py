"""Benchmarks of the GPU run only on a GPU (`make gpu-check`); they never fall back to the CPU.

pytest-benchmark's table holds times of this package alone. Below it stands a table of those benchmarks that measure a
peer in the same run: its name, both times, and ours over the peer's.
"""

from __future__ import annotations

import dgemma_ext.openmp  # noqa: F401  It stands first: it acts before torch is loaded.

# isort: split
from typing import Any

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: make gpu-check"))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [
        (one.name, str(info["peer"]), f"{info['ours_ms']:,}", f"{info['peer_ms']:,}", f"{info['ratio']:.3f}")
        for one in (session.benchmarks if session is not None else ())
        if "peer" in (info := one.extra_info) and "ours_ms" in info
    ]
    if not rows:
        return
    table = [("benchmark", "peer", "ours ms", "peer's ms", "ours / peer's"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    terminalreporter.section("beside a peer, in the same run")
    for row in table:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        terminalreporter.write_line("  ".join([*left, *right]))
