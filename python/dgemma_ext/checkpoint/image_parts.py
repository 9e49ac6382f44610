"""Content parts that are images: where each form of them holds the image.

The forms are those of transformers' chats and of OpenAI's two interfaces. Images of an address on the network are not
fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dgemma_ext import arguments

IMAGE_TYPES = ("image", "image_url", "input_image")
# The keys of a part of type image. "path" and "image" name files of this machine, or may.
LOCAL_KEYS = ("path", "image")
_KEYS = (*LOCAL_KEYS, "base64", "url")
_FORMS = (
    'an image: {"type": "image"} with one of path, image, base64 and url, or {"type": "image_url", "image_url": '
    '{"url": "data:..."}}'
)


def image_source(name: str, part: Mapping[str, Any]) -> tuple[str, Any]:
    """The key that holds a part's image, and the image: a path, bytes, a Pillow image, a data URL.

    "base64" becomes a data URL. Raises ValueError naming the part where it holds no image or more than one, and for a
    URL that is no data URL.
    """
    kind = part["type"]
    given = {"url": part.get("image_url")} if kind != "image" else {key: part[key] for key in _KEYS if key in part}
    given = {key: value for key, value in given.items() if value is not None}
    if len(given) != 1:
        raise arguments.refusal(name, _FORMS, part)
    ((key, value),) = given.items()
    if key == "url" and isinstance(value, Mapping):
        value = value.get("url")
    if key in ("base64", "url"):
        value = arguments.text(f"{name}['{key}']", value)
    if key == "base64":
        return key, f"data:;base64,{value}"
    if key == "url" and value[:5].lower() != "data:":
        raise ValueError(f"{name} has the URL {arguments.shown(value)}, which is not fetched; send a data URL")
    return key, value
