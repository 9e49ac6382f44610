"""Stop strings, in text that arrives in pieces."""

from __future__ import annotations

import copy
from collections.abc import Sequence


class StopCutter:
    """Passes text on up to the first stop string.

    What may turn out to be the beginning of one is held back, so that a stream never shows a part of it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def feed(self, text: str, is_last: bool = False) -> str:
        """The text that is now certain; `is_last` says that no more will come. After a stop string it is empty."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found = True
            self._held = ""
            return text[: min(places)]
        certain = len(text) if is_last else len(text) - self._beginning(text)
        self._held = text[certain:]
        return text[:certain]

    def preview(self, text: str) -> str:
        """What `feed` would give for a last text; nothing changes."""
        return copy.copy(self).feed(text, is_last=True)

    def _beginning(self, text: str) -> int:
        """The length of the longest end of the text that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
