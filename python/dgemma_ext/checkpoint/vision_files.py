"""How a checkpoint's files hold the vision tower: all of its tensors or none."""

from __future__ import annotations

from dgemma_ext.checkpoint.config import ModelConfig
from dgemma_ext.checkpoint.files import CheckpointInfo
from dgemma_ext.checkpoint.stored import StoredTensor, find_weight
from dgemma_ext.checkpoint.vision_config import VisionConfig, vision_tensors
from dgemma_ext.errors import CheckpointError


def find_vision(info: CheckpointInfo, config: ModelConfig) -> tuple[VisionConfig, dict[str, StoredTensor]] | None:
    """The tower's configuration, and how each of its tensors is stored, by its published name.

    None for a checkpoint without a `vision_config`, or without any tensor of a tower. Raises CheckpointError naming
    the field that is not supported, or file and tensor for one that is missing, extra, misshapen or quantized.
    """
    stored_names = info.vision_tensors
    if config.vision is None or not stored_names:
        return None
    try:
        vision = VisionConfig.from_dict(config.vision)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    found: dict[str, StoredTensor] = {}
    for name, shape in vision_tensors(vision, config.hidden_size).items():
        stored = find_weight(name, shape, info.tensors)
        if stored is None:
            raise CheckpointError("is missing, and other tensors of the vision tower are there", tensor=name)
        if stored.kind != "unquantized":
            raise CheckpointError(f"is quantized ({stored.kind}), which a vision tower's may not be", tensor=name)
        found[name] = StoredTensor(info.tensors[name].name, shape)
    for name in stored_names:
        if name not in found:
            message = "is not part of the vision tower that config.json describes"
            raise CheckpointError(message, file=info.tensors[name].file, tensor=name)
    return vision, found
