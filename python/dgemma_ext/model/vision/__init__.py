"""Images: from a file or a Pillow image to what stands for it in the prompt.

`pixels` reads an image and cuts it into patches, `tower` is the vision tower over them, `loading` takes its weights
from a checkpoint, and `images` keeps what a model's prompts need of all this.
"""

from __future__ import annotations

from dgemma_ext.checkpoint.vision_config import SOFT_TOKENS
from dgemma_ext.model.vision.images import KEPT_FEATURES, PromptImage, Vision
from dgemma_ext.model.vision.loading import load_tower, resolve_images
from dgemma_ext.model.vision.pixels import MOST_PIXELS, ImageLimits, Patches, image_size, patches_of, read_image
from dgemma_ext.model.vision.tower import VisionTower, tower_workspace_bytes

__all__ = [
    "KEPT_FEATURES",
    "MOST_PIXELS",
    "SOFT_TOKENS",
    "ImageLimits",
    "Patches",
    "PromptImage",
    "Vision",
    "VisionTower",
    "image_size",
    "load_tower",
    "patches_of",
    "read_image",
    "resolve_images",
    "tower_workspace_bytes",
]
