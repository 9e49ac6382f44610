"""The releases of vLLM that the plugin was written against: the newest, and the one before."""

from __future__ import annotations

import re

KNOWN = ((0, 32), (0, 33))


def release(version: str) -> tuple[int, int] | None:
    """Major and minor number of a version such as 0.32.0+cpu; None for what is not a version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def refused(version: str) -> str | None:
    """Why the plugin stays off beside this release, or None."""
    if release(version) in KNOWN:
        return None
    wanted = " and ".join(f"{major}.{minor}" for major, minor in KNOWN)
    return f"dgemma_ext knows vLLM {wanted}, and this is {version}: vLLM's own code runs"
