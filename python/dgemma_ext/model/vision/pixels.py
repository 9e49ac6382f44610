"""The pixels of an image as the vision tower reads them: upright, on white, resized to whole cells, cut into patches.

What transformers' Gemma4ImageProcessor computes with Pillow (processing_gemma4.py and image_processing_pil_gemma4.py of
5.23), to the bit, but for one rule of loading: every source is turned upright by its EXIF tag and laid on white, where
transformers does the one to files and the other to images in memory.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dgemma_ext import arguments
from dgemma_ext.checkpoint.vision_config import PATCH, POOL, SOFT_TOKENS

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = PATCH * POOL

# Pillow's own limit, above which it warns of decompression bombs.
MOST_PIXELS = 89_478_485

# What a pixel may be: others lose their values in an RGB image of 8 bits (16-bit grey becomes white).
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_DATA_URL = re.compile(r"data:(?P<type>[^,]*?)(?P<base64>;base64)?,", re.IGNORECASE)
_WANTED = "a path, the bytes of an image file, a data URL or a Pillow image"


@dataclass(frozen=True)
class ImageLimits:
    """What images are taken.

    pixels: the most, at most MOST_PIXELS; a larger image is not decoded. formats: of files, by Pillow's names; None for
    all that it reads, for some of which (EPS) it starts other programs.
    """

    pixels: int = MOST_PIXELS
    formats: tuple[str, ...] | None = None


NO_LIMITS = ImageLimits()


@dataclass(frozen=True)
class Patches:
    """An image that is cut up. pixels: float32 [patches, 768] in [0, 1], a patch's rows from the top, its columns from
    the left, red, green, blue. positions: int64 [patches, 2], the patch's column and row. Patches go row by row.
    soft_tokens: what the image becomes, patches / 9."""

    pixels: torch.Tensor
    positions: torch.Tensor
    soft_tokens: int


# Reading --------------------------------------------------------------------------------------------------------------


def read_image(name: str, source: Any, limits: ImageLimits = NO_LIMITS) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image as uint8 [height, width, 3], red, green and blue: upright by its EXIF tag, transparency on white.

    source: a path (a string or an os.PathLike), the bytes of a file, a `data:` URL, or a Pillow image. Of a file with
    several frames the first. Nothing is fetched from a network. Raises ValueError naming the argument `name` for a
    source that is none of these, no image, cut off, of 16 bits or floating point, or beyond the limits; ImportError
    where Pillow is not installed.
    """
    pillow = _pillow()
    if isinstance(source, pillow.Image.Image):
        image, opened = source, False
    else:
        image, opened = _opened(name, source, limits.formats), True
    try:
        return _rgb(name, image, limits.pixels)
    finally:
        if opened:
            image.close()


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError("images need Pillow: pip install 'dgemma_ext[images]'") from error
    return PIL


def _opened(name: str, source: Any, formats: tuple[str, ...] | None) -> Image:
    pillow = _pillow()
    if isinstance(source, bytes | bytearray | memoryview):
        file: Any = io.BytesIO(bytes(source))
    elif isinstance(source, str) and (url := _DATA_URL.match(source)):
        file = io.BytesIO(_decoded(name, url, source))
    elif isinstance(source, str | os.PathLike):
        file = arguments.path(name, source)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", file):
            raise ValueError(f"{name} is a URL, which is not fetched; read it and give its bytes, or a data URL")
    else:
        raise arguments.refusal(name, _WANTED, source)
    bombs = (pillow.Image.DecompressionBombError, pillow.Image.DecompressionBombWarning)
    try:
        image: Image = pillow.Image.open(file, formats=formats)
    except bombs as error:
        raise _too_large(name, MOST_PIXELS) from error
    except pillow.UnidentifiedImageError as error:
        wanted = "that Pillow can read" if formats is None else f"in a format of {', '.join(formats)}"
        raise ValueError(f"{name} is no image {wanted}") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character, a file of a broken format
        raise ValueError(f"{name} cannot be read: {error}") from error
    return image


def _too_large(name: str, most_pixels: int) -> ValueError:
    return ValueError(f"{name} is an image of more than {most_pixels:,} pixels")


def _decoded(name: str, url: re.Match[str], source: str) -> bytes:
    if url["base64"] is None:
        raise ValueError(f"{name} is a data URL without ;base64")
    try:
        return base64.b64decode(source[url.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} is a data URL whose base64 cannot be decoded: {error}") from error


def _rgb(name: str, image: Image, most_pixels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    pillow = _pillow()
    if image.mode not in _MODES:
        wanted = "8 bits a channel, such as RGB, RGBA, L or P"
        raise ValueError(f"{name} has pixels of mode {image.mode}; supported: {wanted}")
    if image.width * image.height > most_pixels:
        raise _too_large(name, most_pixels)
    try:
        upright = pillow.ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            above = upright.convert("RGBA")
            white = pillow.Image.new("RGBA", above.size, (255, 255, 255, 255))
            upright = pillow.Image.alpha_composite(white, above)
        return np.array(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's readers raise at damaged files
        raise ValueError(f"{name} cannot be decoded: {error}") from error


# Patches --------------------------------------------------------------------------------------------------------------


def image_size(height: int, width: int, soft_tokens: int = 280) -> tuple[int, int]:
    """The height and width that an image is resized to: multiples of 48 of about its shape, small images enlarged.

    Both sides are scaled so that the area is that of `soft_tokens` cells, and rounded down to whole cells. Where one is
    more than `soft_tokens` times as long as the other, they are `soft_tokens` cells and one.
    Raises ValueError for another number of soft tokens than SOFT_TOKENS, and for an image without pixels.
    """
    if soft_tokens not in SOFT_TOKENS:
        raise arguments.refusal("soft_tokens", f"one of {', '.join(map(str, SOFT_TOKENS))}", soft_tokens)
    if height < 1 or width < 1:
        raise ValueError(f"an image must have pixels, got {width} x {height}")
    factor = math.sqrt(soft_tokens * CELL**2 / (height * width))
    rows, columns = math.floor(factor * height / CELL), math.floor(factor * width / CELL)
    if rows == 0:
        rows, columns = 1, soft_tokens
    elif columns == 0:
        rows, columns = soft_tokens, 1
    return rows * CELL, columns * CELL


def patches_of(rgb: np.ndarray[Any, np.dtype[np.uint8]], soft_tokens: int = 280) -> Patches:
    """An image, uint8 [height, width, 3], resized and cut into patches. Raises ValueError as `image_size` does."""
    return cut(resized(rgb, soft_tokens))


def resized(rgb: np.ndarray[Any, np.dtype[np.uint8]], soft_tokens: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image at the size that `image_size` gives (bicubic with antialias, as Pillow does it), uint8 as it was.

    Raises ValueError as `image_size` does.
    """
    pillow = _pillow()
    height, width = image_size(rgb.shape[0], rgb.shape[1], soft_tokens)
    if rgb.shape[:2] == (height, width):
        return rgb
    return np.array(pillow.Image.fromarray(rgb).resize((width, height), pillow.Image.Resampling.BICUBIC))


def cut(rgb: np.ndarray[Any, np.dtype[np.uint8]]) -> Patches:
    """An image of whole cells, uint8 [height, width, 3], as patches.

    The tower gets no padding: an image has as many patches as it needs, so its bits depend on nothing beside it.
    """
    height, width = rgb.shape[:2]
    # Multiplied in float64 and rounded once, as transformers does.
    values = (np.arange(256) * (1 / 255)).astype(np.float32)
    rows, columns = height // PATCH, width // PATCH
    pixels = values[rgb].reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 1, 3, 4)
    y, x = np.divmod(np.arange(rows * columns), columns)
    return Patches(
        torch.from_numpy(np.ascontiguousarray(pixels).reshape(rows * columns, -1)),
        torch.from_numpy(np.stack((x, y), -1)),
        rows * columns // POOL**2,
    )
