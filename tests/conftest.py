"""Settings of all tests: seeds, threads, and the CPU variants of this machine."""

from __future__ import annotations

import os

# torch reads this when it loads its OpenMP runtime: waiting threads sleep. Spinning ones take the other threads'
# time on a busy or single-core machine, where tests then take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_session
from backend import BACKEND, VARIANTS
from dgemma_ext import _C, ops  # noqa: F401  registers torch.ops.dgemma
from dgemma_ext.checkpoint import Tokenizer
from tokenizer_files import write_tokenizer

# A GPU run of the suite sets this (tools/gpu_check.py); a missing GPU is then an error, not a skip.
GPU_RUN = os.environ.get("DGEMMA_GPU") == "1"


def pytest_configure(config: pytest.Config) -> None:
    # Two threads are enough to test work on several threads, and are the same on every machine.
    torch.set_num_threads(2)
    if (GPU_RUN or BACKEND == "cuda") and not torch.cuda.is_available():
        raise pytest.UsageError("a run on the GPU was asked for, but none is visible to torch")
    if GPU_RUN:
        config.pluginmanager.register(gpu_session)
    if BACKEND == "cuda":
        from on_gpu import run_operators_on

        run_operators_on("cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if GPU_RUN:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: make gpu-check"))


def pytest_report_header() -> str:
    return f"dgemma_ext {_C.version()}, CPU variants {', '.join(_C.cpu_variants())}, CUDA kernels: {_C.has_cuda()}"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Makes random numbers the same in every run, whichever tests ran before."""
    torch.manual_seed(20260610)


@pytest.fixture(params=VARIANTS)
def cpu_variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test for every instruction set of this machine, or once for another backend; gives its name."""
    name: str = request.param
    if BACKEND == "cpu":
        monkeypatch.setenv("DGEMMA_CPU", name)
    return name


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 512 entries with the template of the published model's kind."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 512)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_directory(tokenizer_folder)


@pytest.fixture(scope="session")
def transformers_tokenizer(tokenizer_folder: Path) -> Any:
    """transformers' tokenizer of the same files."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
