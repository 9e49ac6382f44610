"""The vision tower's weights, loaded from a checkpoint."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dgemma_ext import arguments
from dgemma_ext.checkpoint import CheckpointInfo, LoadProgress, MappedFiles, ModelConfig, weight_reader
from dgemma_ext.checkpoint.vision_config import VisionConfig
from dgemma_ext.checkpoint.vision_files import find_vision
from dgemma_ext.errors import CheckpointError
from dgemma_ext.model.vision.tower import VisionTower


def resolve_images(images: str | bool, info: CheckpointInfo, config: ModelConfig) -> VisionConfig | None:
    """The tower to load by the option `images` of from_pretrained: "auto" is the checkpoint's where it has one.

    None for no tower. Raises ValueError for another value, and CheckpointError as `find_vision` does and, with True,
    for a checkpoint without a tower.
    """
    if not (isinstance(images, str) and images == "auto"):
        try:
            wanted = arguments.flag("images", images)
        except ValueError as error:
            raise arguments.refusal("images", "auto, True or False", images) from error
        if not wanted:
            return None
    try:
        found = find_vision(info, config)
    except CheckpointError as error:
        message = f"{error.message}; images=False loads the model without its vision tower"
        raise CheckpointError(message, file=error.file, tensor=error.tensor) from error
    if found is None and images != "auto":
        raise CheckpointError("images is True, and the checkpoint has no vision tower", file=info.files[0].parent)
    return None if found is None else found[0]


def load_tower(
    info: CheckpointInfo,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: bool | None = None,
) -> VisionTower | None:
    """The tower of an inspected checkpoint in `dtype` on `device`; None for a checkpoint without one.

    As `load_weights` does, on the CPU it leaves what is stored in `dtype` in the mapped files, and converts the rest;
    every value is checked. Raises CheckpointError as `find_vision` does, and for NaN and infinite values.
    """
    found = find_vision(info, config)
    if found is None:
        return None
    vision, stored = found
    with (
        LoadProgress("loading the vision tower", info.vision_bytes, progress) as bar,
        MappedFiles(info) as files,
        weight_reader(files, dtype, torch.device(device), bar.advance) as reader,
    ):
        # find_vision has seen that none is quantized.
        tensors = {name: cast("Tensor", reader.read(one)) for name, one in stored.items()}
    return VisionTower.from_tensors(vision, tensors)
