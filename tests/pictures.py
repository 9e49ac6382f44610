"""Images by formula, and files of them, for the tests of images."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def gradient(width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [height, width, 3]: r = 5x + 3y, g = 7x² + y, b = 11xy + 13, modulo 256."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    return np.stack((5 * x + 3 * y, 7 * x * x + y, 11 * x * y + 13), -1).astype(np.uint8)


def smooth(width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [height, width, 3] without jumps: ramps of whole numbers."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    across, down = max(width - 1, 1), max(height - 1, 1)
    ramps = (255 * x // across, 255 * y // down, 255 * (x + y) // max(width + height - 2, 1))
    return np.stack(ramps, -1).astype(np.uint8)


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
