"""Formatting of byte counts."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """A byte count in decimal units with four significant digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count} bytes"
