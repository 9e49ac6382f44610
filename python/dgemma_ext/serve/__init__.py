"""An HTTP server with OpenAI's interface over the scheduler (the extra `serve`).

`build_app` makes the application, `run` serves it until a signal ends it. `options` needs no extra package.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from dgemma_ext.serve.options import ServeOptions

if TYPE_CHECKING:
    from fastapi import FastAPI

    from dgemma_ext.diffusion_gemma import DiffusionGemma

__all__ = ["ServeOptions", "build_app", "require", "run"]

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def require() -> None:
    """Raises ValueError, naming the extra to install, where a package of the server is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the server needs {', '.join(missing)}, which is not installed: pip install 'dgemma_ext[serve]'"
        )


def build_app(model: DiffusionGemma, options: ServeOptions | None = None) -> FastAPI:
    """The application that serves `model`; its engine runs between the application's startup and shutdown.

    Raises ValueError where an extra package is missing or the model has no tokenizer, and dg.NotEnoughMemory.
    """
    require()
    from dgemma_ext.serve.app import build

    return build(model, options or ServeOptions())


def run(model: DiffusionGemma, options: ServeOptions | None = None) -> None:
    """Serves `model` until a signal ends it; raises as `build_app` does, and OSError for a port that is taken."""
    require()
    from dgemma_ext.serve.server import serve

    serve(model, options or ServeOptions())
