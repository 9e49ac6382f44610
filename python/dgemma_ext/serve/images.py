"""Images of a request: found in its messages, held to the server's limits, and read.

Clients send data URLs. Nothing is fetched: an address would let a client ask what it wants of the server's network, and
a path would let it read the server's files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dgemma_ext import arguments
from dgemma_ext.checkpoint import IMAGE_TYPES, LOCAL_KEYS, image_source
from dgemma_ext.model.vision import SOFT_TOKENS, ImageLimits, PromptImage, Vision
from dgemma_ext.serve import errors
from dgemma_ext.serve.options import ServeOptions

# Where a message, or an item of /v1/responses, has parts.
_PLACES = ("content", "output")
_BUDGET = "max_soft_tokens"
# Pillow reads more, and for some of them starts other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_SHOWN_URL = re.compile(r"data:[^,]{0,80},", re.IGNORECASE)


def image_tokens_of(settings: Mapping[str, Any] | None) -> int | None:
    """What a request's images become at most, from vLLM's field for the image processor. Raises ApiError."""
    field = "mm_processor_kwargs"
    for name in settings or {}:
        if name != _BUDGET:
            raise errors.not_supported(f"{field}.{name}", f"{field} may have {_BUDGET} alone here, got {name!a:.60}")
    budget = (settings or {}).get(_BUDGET)
    if budget is not None and (isinstance(budget, bool) or budget not in SOFT_TOKENS):
        wanted = ", ".join(map(str, SOFT_TOKENS))
        message = f"{field}.{_BUDGET} must be one of {wanted}, got {arguments.shown(budget)}"
        raise errors.bad_request(message, f"{field}.{_BUDGET}")
    return budget


def with_images_read(
    turns: Sequence[Mapping[str, Any]],
    field: str,
    vision: Vision | None,
    options: ServeOptions,
    image_tokens: int | None,
) -> list[Mapping[str, Any]]:
    """The messages, or items, with their images decoded and resized, which takes a while. `field` is what errors call
    the list. Raises ApiError for an image that is not taken."""
    made = [dict(turn) for turn in turns]
    for index, (name, parts, place) in enumerate(_images(made, field)):
        if vision is None:
            raise errors.not_supported(name, "the model that is served here takes no images: it has no vision tower")
        if index >= options.max_images:
            raise errors.bad_request(f"a request may have {options.max_images} images here", name, "too_many_images")
        parts[place] = {"type": "image", "image": _read(name, parts[place], vision, options, image_tokens)}
    return list(made)


def for_log(value: Any) -> Any:
    """What a client sent, without the data of its images."""
    if isinstance(value, str):
        found = _SHOWN_URL.match(value)
        return value if found is None else f"{found.group()}... ({len(value)} characters)"
    if isinstance(value, Mapping):
        return {key: for_log(entry) for key, entry in value.items()}
    return [for_log(entry) for entry in value] if isinstance(value, list) else value


def _images(turns: Sequence[dict[str, Any]], field: str) -> Iterator[tuple[str, list[Any], int]]:
    """For every image what errors call it, the list of parts that it is in, and its index there.

    The lists are copies, which may be written to.
    """
    for index, turn in enumerate(turns):
        for key in _PLACES:
            parts = turn.get(key)
            if not isinstance(parts, list):
                continue
            turn[key] = copied = list(parts)
            for place, part in enumerate(parts):
                if isinstance(part, Mapping) and part.get("type") in IMAGE_TYPES:
                    yield f"{field}[{index}].{key}[{place}]", copied, place


def _read(
    name: str, part: Mapping[str, Any], vision: Vision, options: ServeOptions, image_tokens: int | None
) -> PromptImage:
    try:
        key, source = image_source(name, part)
        if key in LOCAL_KEYS:
            raise ValueError(f"{name} has {key}; images are taken as data URLs here")
        # Four characters of base64 are three bytes, less those that are padding.
        if (len(source) - source.find(",") - 1) * 3 // 4 - source[-2:].count("=") > options.max_image_bytes:
            raise ValueError(f"{name} is an image file of more than {options.max_image_bytes} bytes")
        return vision.read(name, source, image_tokens, ImageLimits(options.max_image_pixels, _FORMATS))
    except (ValueError, ImportError) as error:
        raise errors.bad_request(str(error), name) from error
