"""What a server is told when it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dgemma_ext import arguments
from dgemma_ext.model.vision import MOST_PIXELS

_MEGABYTE = 1 << 20


@dataclass(frozen=True)
class ServeOptions:
    """The options of `dgemma serve`.

    host, port: the address to listen on; port 0 takes a free one. api_key: clients must send it; None lets all in.
    served_model_names: what clients may call the model, default "dgemma"; the first is the one in answers, and with ":"
    and an adapter's name behind it it is the model with that adapter. max_batch, max_length, prefix_cache_bytes: as in
    dg.Scheduler. max_waiting: further requests that may wait for a slot; those beyond get status 429. max_body_bytes:
    of a request. max_images, max_image_bytes, max_image_pixels: how many images a request may have, and what each may
    be at most, as a file and decoded. request_timeout, body_timeout, drain_timeout: seconds that an answer may take and
    its client may read nothing of it, that a request's head and its body may take to arrive, and that a signal waits
    for running requests. cors_origins: origins whose pages may call the server, "*" for all; none by default.
    log_prompts: whether logs hold prompts and answers. trim_canvas: the default of the sampler's setting of this name,
    so that short answers cost less than a canvas.

    Raises ValueError naming the field.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    served_model_names: Sequence[str] = ("dgemma",)
    max_batch: int = 8
    max_length: int | None = None
    prefix_cache_bytes: int = 1 << 30
    max_waiting: int = 64
    max_body_bytes: int = 8 * _MEGABYTE
    max_images: int = 16
    max_image_bytes: int = 20 * _MEGABYTE
    max_image_pixels: int = 7680 * 4320
    request_timeout: float = 600.0
    body_timeout: float = 30.0
    drain_timeout: float = 300.0
    cors_origins: Sequence[str] = ()
    log_prompts: bool = False
    trim_canvas: bool = True

    def __post_init__(self) -> None:
        for name, value in (
            ("host", arguments.text("host", self.host)),
            ("port", arguments.integer("port", self.port, end=65536)),
            ("api_key", None if self.api_key is None else _key(self.api_key)),
            ("served_model_names", _texts("served_model_names", self.served_model_names)),
            ("max_batch", arguments.integer("max_batch", self.max_batch, least=1)),
            ("max_length", _optional_count("max_length", self.max_length)),
            ("prefix_cache_bytes", arguments.integer("prefix_cache_bytes", self.prefix_cache_bytes, end=2**63)),
            ("max_waiting", arguments.integer("max_waiting", self.max_waiting)),
            ("max_body_bytes", arguments.integer("max_body_bytes", self.max_body_bytes, least=1)),
            ("max_images", arguments.integer("max_images", self.max_images)),
            ("max_image_bytes", arguments.integer("max_image_bytes", self.max_image_bytes, least=1)),
            ("max_image_pixels", arguments.integer("max_image_pixels", self.max_image_pixels, 1, MOST_PIXELS + 1)),
            ("request_timeout", arguments.number("request_timeout", self.request_timeout, zero=False)),
            ("body_timeout", arguments.number("body_timeout", self.body_timeout, zero=False)),
            ("drain_timeout", arguments.number("drain_timeout", self.drain_timeout)),
            ("cors_origins", _texts("cors_origins", self.cors_origins)),
            ("log_prompts", arguments.flag("log_prompts", self.log_prompts)),
            ("trim_canvas", arguments.flag("trim_canvas", self.trim_canvas)),
        ):
            object.__setattr__(self, name, value)
        if not self.served_model_names:
            raise arguments.refusal("served_model_names", "at least one name", self.served_model_names)

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def _key(value: Any) -> str:
    # An error that shows what it got would show the key.
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError("api_key must be printable text that is not empty")
    return value


def _optional_count(name: str, value: Any) -> int | None:
    return None if value is None else arguments.integer(name, value, least=1)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    entries = arguments.sequence(name, value, "a list of texts")
    return tuple(arguments.text(f"{name}[{index}]", entry) for index, entry in enumerate(entries))
