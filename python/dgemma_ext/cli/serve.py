"""`dgemma serve`: OpenAI's interface over HTTP."""

from __future__ import annotations

import os
from pathlib import Path

from dgemma_ext import serve
from dgemma_ext.checkpoint import resolve_checkpoint
from dgemma_ext.cli.answer import load_checkpoint
from dgemma_ext.cli.arguments import Arguments

_KEY_VARIABLE = "DGEMMA_API_KEY"


def run(arguments: Arguments) -> None:
    serve.require()
    # Checked first, because loading weights can take a minute.
    options = serve.ServeOptions(
        host=arguments.host,
        port=arguments.port,
        api_key=arguments.api_key or os.environ.get(_KEY_VARIABLE) or None,
        served_model_names=arguments.served_model_name or [_usual_name(arguments.model)],
        max_batch=arguments.max_batch,
        max_length=arguments.max_length,
        prefix_cache_bytes=arguments.prefix_cache_bytes,
        max_waiting=arguments.max_waiting,
        max_body_bytes=arguments.max_body_bytes,
        max_images=arguments.max_images,
        max_image_bytes=arguments.max_image_bytes,
        max_image_pixels=arguments.max_image_pixels,
        request_timeout=arguments.request_timeout,
        body_timeout=arguments.body_timeout,
        drain_timeout=arguments.drain_timeout,
        cors_origins=arguments.cors_origin,
        log_prompts=arguments.log_prompts,
        trim_canvas=arguments.trim_canvas,
    )
    model = load_checkpoint(Path(resolve_checkpoint(arguments.model)), arguments)
    serve.run(model, options)


def _usual_name(model: str) -> str:
    """A hub id or a bundled model as it is written, a folder by its own name."""
    return Path(model).resolve().name if Path(model).expanduser().is_dir() else model
