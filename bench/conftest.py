"""Benchmarks of the GPU run only on a GPU (`make gpu-check`); they never fall back to the CPU."""

from __future__ import annotations

import dgemma_ext.openmp  # noqa: F401  It stands first: it acts before torch is loaded.

# isort: split
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: make gpu-check"))
