"""Where the time of a denoising step goes: by part, beside what its bytes and FLOPs take at best on this device."""

from __future__ import annotations

from dgemma_ext.profile.run import Profile, check_sizes, profile
from dgemma_ext.profile.timeline import Pass, Row

__all__ = ["Pass", "Profile", "Row", "check_sizes", "profile"]
