"""Seconds that the decoder layers of a model take, added up over calls. Each side of peers_cpu.py has one."""

from __future__ import annotations

import time


class LayersClock:
    def __init__(self) -> None:
        self.seconds = self.processor = 0.0

    def start(self) -> None:
        self.seconds -= time.perf_counter()
        self.processor -= time.process_time()

    def stop(self) -> None:
        self.seconds += time.perf_counter()
        self.processor += time.process_time()

    def take(self) -> dict[str, float]:
        """Seconds of the wall and of all threads' processors since the last call."""
        found = {"layers": self.seconds, "layers_processor": self.processor}
        self.seconds = self.processor = 0.0
        return found
