"""DiffusionGemma on one GPU or any CPU, with kernels written for it."""

from __future__ import annotations

from dgemma_ext.errors import CheckpointError, NonFiniteError

__version__ = "0.1.0"

__all__ = ["CheckpointError", "NonFiniteError", "__version__"]
