"""The time of the vision tower for one image, and the work that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dgemma_ext.checkpoint.vision_config import PATCH, POOL, VisionConfig
from dgemma_ext.model.vision import PromptImage, Vision, VisionTower, image_size
from dgemma_ext.profile.count import PLAIN
from dgemma_ext.profile.machine import Machine

# Sides of an image with soft tokens for all that it may take, whatever that is: 10 cells to 7.
_SHAPE = (700, 1000)


@dataclass(frozen=True)
class TowerTime:
    """Seconds for an image of so many soft tokens, after a smaller one; `floor`: the least that its work takes."""

    soft_tokens: int
    seconds: float
    floor: float


def tower_time(vision: Vision, machine: Machine, timed: Callable[[Callable[[], object]], float]) -> TowerTime:
    """Runs the tower on an image of the usual size; `timed` gives the seconds of a run."""
    generator = np.random.default_rng(0)
    sizes = [image_size(*_SHAPE, soft_tokens) for soft_tokens in (70, vision.soft_tokens)]
    small, usual = (PromptImage(generator.integers(0, 256, (*size, 3), np.uint8)) for size in sizes)
    vision.tower.features(small.patches)
    patches = usual.patches
    seconds = timed(lambda: vision.tower.features(patches))
    moved, flops = tower_work(vision.tower, usual.soft_tokens)
    return TowerTime(usual.soft_tokens, seconds, machine.floor(moved, {PLAIN: flops}))


def tower_work(tower: VisionTower, soft_tokens: int) -> tuple[float, float]:
    """Bytes of the weights that an image reads, and FLOPs of its products and its attention."""
    config, text_hidden = tower.config, tower.projection.shape[0]
    flops = _flops(config, text_hidden, soft_tokens)
    return float(tower.nbytes - tower.positions.nbytes), flops


def _flops(config: VisionConfig, text_hidden: int, soft_tokens: int) -> float:
    patches, hidden, heads = soft_tokens * POOL**2, config.hidden_size, config.num_heads * config.head_dim
    products = 4 * hidden * heads + 3 * hidden * config.intermediate_size
    layer = 2.0 * patches * products + 4.0 * patches**2 * heads
    return config.num_layers * layer + 2.0 * patches * 3 * PATCH**2 * hidden + 2.0 * soft_tokens * hidden * text_hidden
