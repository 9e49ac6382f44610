"""How torch's threads wait for each other: set when the package is imported, before torch is.

The threads of GNU's OpenMP, which torch computes with, spin for some 300,000 rounds (4 ms) before they sleep. Where
other work runs on the machine, a thread that others wait for may not have a core, and all the spinning is lost:
bench/bench_wait_policy.py compares. libgomp reads its settings once, when torch loads it.
"""

from __future__ import annotations

import os
import sys

# Rounds before a waiting thread sleeps; the figures are in docs/performance.md.
SPIN_COUNT = "1000"
# A user who has set one of these knows better.
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def load_torch() -> None:
    """Imports torch with threads that soon sleep, unless the user chose or torch is there. Child processes inherit
    nothing of it."""
    if "torch" in sys.modules or any(name in os.environ for name in _SETTINGS):
        return
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    try:
        import torch  # noqa: F401
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


load_torch()
