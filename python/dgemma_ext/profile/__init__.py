"""Profiles a denoising step: the time of each part, beside the least time that its bytes and FLOPs take here."""

from __future__ import annotations

from dgemma_ext.profile.run import Profile, check_sizes, profile
from dgemma_ext.profile.timeline import Pass, Row

__all__ = ["Pass", "Profile", "Row", "check_sizes", "profile"]
