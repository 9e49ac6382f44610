"""Images of a command line: what they say to the loading of a model, and those that are given beside a message."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.errors import CheckpointError
from dgemma_ext.model.vision import PromptImage, Vision, read_image

_LOADED = {"auto": "auto", "on": True, "off": False}
# What errors of from_pretrained call its argument, by the words of the command line.
_SPELLED = {"images=False": "--images off", "images is True": "the vision tower is wanted"}


def loading(arguments: Arguments) -> dict[str, Any]:
    """The arguments of from_pretrained. A command without flags of images loads a tower where there is one."""
    if not hasattr(arguments, "images"):
        return {}
    images = "on" if getattr(arguments, "image", []) else arguments.images
    return {"images": _LOADED[images], "image_attention": arguments.image_attention}


@contextmanager
def spelled_as_flags() -> Iterator[None]:
    """Errors of loading name the command's flags."""
    try:
        yield
    except CheckpointError as error:
        message = error.message
        for argument, flag in _SPELLED.items():
            message = message.replace(argument, flag)
        raise CheckpointError(message, file=error.file, tensor=error.tensor) from error


def check(arguments: Arguments) -> None:
    """Raises ValueError for an image that cannot be read: before weights are, which can take a minute."""
    if arguments.image and arguments.images == "off":
        raise ValueError("--image needs the vision tower, which --images off leaves out")
    for file in arguments.image:
        try:
            read_image(f"--image {file}", os.path.expanduser(file))
        except ImportError as error:
            raise ValueError(str(error)) from error


def content(text: str, files: Sequence[str]) -> str | list[dict[str, Any]]:
    """What the user's message holds: the text, or images and the text."""
    if not files:
        return text
    parts = [{"type": "image", "path": os.path.expanduser(file)} for file in files]
    return [*parts, {"type": "text", "text": text}]


def read_for_chat(vision: Vision | None, file: str, image_tokens: int | None) -> PromptImage:
    """The image of /image. Raises ValueError where it cannot be read, or the model has no tower."""
    if not file:
        raise ValueError("/image takes the path of an image")
    if vision is None:
        raise ValueError("/image: the model has no vision tower: its checkpoint has none, or --images off left it out")
    try:
        return vision.read(f"/image {file}", os.path.expanduser(file), image_tokens)
    except ImportError as error:
        raise ValueError(str(error)) from error
