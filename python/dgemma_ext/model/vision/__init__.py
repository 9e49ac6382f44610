"""Images: from a file or a Pillow image to what stands for it in the prompt.

`pixels` reads an image and cuts it into patches, `tower` is the vision tower over them, and `loading` takes its weights
from a checkpoint.
"""

from __future__ import annotations

from dgemma_ext.checkpoint.vision_config import SOFT_TOKENS
from dgemma_ext.model.vision.loading import load_tower
from dgemma_ext.model.vision.pixels import Patches, image_size, patches_of, read_image
from dgemma_ext.model.vision.tower import VisionTower

__all__ = ["SOFT_TOKENS", "Patches", "VisionTower", "image_size", "load_tower", "patches_of", "read_image"]
