"""The command `dgemma`."""

from __future__ import annotations

from dgemma_ext.cli.run import main

__all__ = ["main"]
