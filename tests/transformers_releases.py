"""Runs test files again under an older release of transformers, in a folder of its own that `make test` fills.

What is slow, or no test of this package, is left out: with DGEMMA_ALL_RELEASES=1 everything runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The oldest supported release and the one before the newest, which requirements/dev.txt names.
OLDER = ("5.17", "5.23")
# Set in the process that runs under another release, which must not start further ones.
_INSIDE = "DGEMMA_TRANSFORMERS_RELEASE"
ALL = os.environ.get("DGEMMA_ALL_RELEASES") == "1"


def run_under(release: str, *files: Path, keywords: str) -> None:
    """Runs test files in another process; skips where the folder is not there. keywords: pytest's -k, unless ALL."""
    if _INSIDE in os.environ:
        pytest.skip(f"runs under {os.environ[_INSIDE]} already")
    folder = ROOT / ".venv" / f"transformers-{release}"
    if not (folder / "transformers").is_dir():
        pytest.skip(f"transformers {release} is not in {folder.relative_to(ROOT)}: make older-transformers")
    environment = os.environ | {_INSIDE: release, "PYTHONPATH": str(folder)}
    version = "import transformers; print(transformers.__version__)"
    found = subprocess.run([sys.executable, "-c", version], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(f"{release}.")
    run = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, files)]
    done = subprocess.run(run if ALL else [*run, "-k", keywords], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
