"""The tokens of a request up to its canvas: those that its slot holds, and those that the canvas waits for."""

from __future__ import annotations

from collections.abc import Sequence

from dgemma_ext.engine.prompt import PlacedImage, TokenizedPrompt


class ContextTokens:
    """A request's tokens in order. ids: all; keys: what the prefix cache knows them by (`TokenizedPrompt.keys`);
    cached: how many of them the slot holds."""

    def __init__(self, prompt: TokenizedPrompt, vocab_size: int) -> None:
        self.ids = list(prompt.ids)
        self.keys = prompt.keys(vocab_size)
        self.images = prompt.images
        self.cached = 0

    @property
    def waiting(self) -> int:
        """How many tokens a canvas sees that are not in the slot yet."""
        return len(self.ids) - self.cached

    def append(self, ids: Sequence[int]) -> None:
        """Adds the tokens of a finished canvas."""
        self.ids += ids
        self.keys += ids

    def images_between(self, begin: int, end: int) -> list[PlacedImage]:
        """The images whose soft tokens are at positions in [begin, end)."""
        return [image for image in self.images if begin <= image.start and image.end <= end]

    def uncut(self, end: int) -> int:
        """The positions before `end`, without those of an image that goes on behind it."""
        return next((image.start for image in self.images if image.start < end < image.end), end)
