"""Which transformers this is, and which ones are known."""

from __future__ import annotations

import transformers

# The first release whose DiffusionGemma this package's parity tests pass with.
OLDEST = (5, 17)
# The last one whose private `_denoising_step` was looked at and tested; the registers are public, and stay.
NEWEST_KNOWN_STEP = (5, 23)


def release_name() -> str:
    return str(transformers.__version__)


def release() -> tuple[int, int]:
    """Major and minor number."""
    major, minor = release_name().split(".")[:2]
    return int(major), int(minor)
