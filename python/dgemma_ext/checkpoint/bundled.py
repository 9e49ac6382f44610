"""The small models that ship with the package, by the names that stand for their folders."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent.parent / "demo"
# Grids of Sudoku that a model solves → its folder, the largest last.
BUNDLED = {"6x6": _FOLDER, "9x9": _FOLDER / "9x9"}
# In place of a name: the largest.
DEMO = "demo"


def bundled_checkpoint(name: str) -> Path | None:
    """The folder of the bundled model that `name` ("6x6", "9x9", or "demo" for the largest) stands for, or None."""
    return [*BUNDLED.values()][-1] if name == DEMO else BUNDLED.get(name)
