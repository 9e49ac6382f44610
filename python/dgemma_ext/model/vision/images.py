"""Images of prompts: read once, told apart by the hash of their pixels, and their features kept for a while."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from dgemma_ext.checkpoint.vision_config import PATCH
from dgemma_ext.model.vision.pixels import CELL, NO_LIMITS, ImageLimits, Patches, cut, read_image, resized
from dgemma_ext.model.vision.tower import VisionTower

# Images whose features are kept: those of a conversation, for a turn that no snapshot has. 280 soft tokens of the
# published model take 1.6 MB.
KEPT_FEATURES = 8


@dataclass(frozen=True, eq=False, repr=False)
class PromptImage:
    """An image that is read and resized. pixels: uint8 [height, width, 3], whole cells of 48 x 48.

    digest: the SHA-256 of size and pixels; images of the same digest have the same features.
    """

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        size = f"{self.pixels.shape[0]} {self.pixels.shape[1]} ".encode()
        object.__setattr__(self, "digest", hashlib.sha256(size + self.pixels.tobytes()).digest())

    def __repr__(self) -> str:
        return f"PromptImage({self.pixels.shape[1]} x {self.pixels.shape[0]})"

    @property
    def soft_tokens(self) -> int:
        return self.pixels.shape[0] * self.pixels.shape[1] // CELL**2

    @property
    def patches(self) -> Patches:
        return cut(self.pixels)


class Vision:
    """A vision tower, with what prompts need around it. soft_tokens: what an image takes at most where a prompt does
    not say, one of SOFT_TOKENS.

    Threads may share it.
    """

    def __init__(self, tower: VisionTower, soft_tokens: int = 280) -> None:
        self.tower = tower
        self.soft_tokens = soft_tokens
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()  # digest → features, the newest last
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, by copy.deepcopy or pickle, keeps no features."""
        return {"tower": self.tower, "soft_tokens": self.soft_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(
        self, name: str, source: Any, soft_tokens: int | None = None, limits: ImageLimits = NO_LIMITS
    ) -> PromptImage:
        """An image as `read_image` takes it, at the size for so many soft tokens at most.

        A PromptImage is taken as it is. Raises ValueError as `read_image` and `image_size` do, and for an image with
        more patches in a line than the tower has positions; ImportError where Pillow is not installed.
        """
        if isinstance(source, PromptImage):
            return source
        image = PromptImage(resized(read_image(name, source, limits), soft_tokens or self.soft_tokens))
        try:
            self.tower.check_length(max(image.pixels.shape[:2]) // PATCH)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return image

    def features(self, image: PromptImage) -> Tensor:
        """What stands for the image's soft tokens: [soft_tokens, text hidden], on the tower's device."""
        with self._lock:
            known = self._features.get(image.digest)
            if known is not None:
                self._features.move_to_end(image.digest)
                return known
        made = self.tower.features(image.patches)
        with self._lock:
            self._features[image.digest] = made
            while len(self._features) > KEPT_FEATURES:
                self._features.popitem(last=False)
        return made
