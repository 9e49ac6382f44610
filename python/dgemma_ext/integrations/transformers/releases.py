"""The installed release of transformers, and the supported ones."""

from __future__ import annotations

import re

import transformers

# The first release whose DiffusionGemma this package's parity tests pass with.
OLDEST = (5, 17)
# The last release that the tests were run with. A later one is tried on a small model first (trial.py).
NEWEST_TESTED = (5, 24)


def release_name() -> str:
    return str(transformers.__version__)


def release() -> tuple[int, int]:
    """Major and minor version."""
    numbers = re.findall(r"\d+", release_name())
    return int(numbers[0]), int(numbers[1])
