"""The vision tower's weights, loaded from a checkpoint."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dgemma_ext.checkpoint import CheckpointInfo, LoadProgress, MappedFiles, ModelConfig, weight_reader
from dgemma_ext.checkpoint.vision_files import find_vision
from dgemma_ext.model.vision.tower import VisionTower


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
