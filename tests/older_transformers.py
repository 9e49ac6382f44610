"""Runs test files again under transformers 5.17, the oldest supported release."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = "DGEMMA_TRANSFORMERS_5_17"


def run_under_5_17(*files: Path) -> None:
    """Runs a file in another process; skips where the environment names no folder with that release."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        pytest.skip(f"{FOLDER} names no folder with transformers 5.17 (pip install --target)")
    environment = {name: value for name, value in os.environ.items() if name != FOLDER} | {"PYTHONPATH": folder}
    version = "import transformers; print(transformers.__version__)"
    found = subprocess.run([sys.executable, "-c", version], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("5.17.")
    run = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
