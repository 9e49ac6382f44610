"""The installed release of transformers, and the supported ones."""

from __future__ import annotations

import transformers

# The first release whose DiffusionGemma this package's parity tests pass with.
OLDEST = (5, 17)
# The last release whose private `_denoising_step` was tested. Attention and experts use public registers.
NEWEST_KNOWN_STEP = (5, 23)


def release_name() -> str:
    return str(transformers.__version__)


def release() -> tuple[int, int]:
    """Major and minor version."""
    major, minor = release_name().split(".")[:2]
    return int(major), int(minor)
