"""Whether a call gives Python's lock away, so that other threads, such as a server's event loop, go on meanwhile."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any


def turns_during(work: Callable[[], Any]) -> int:
    """How often another thread has its turn while `work` runs; a call that keeps the lock leaves it none."""
    turns, is_over = 0, threading.Event()

    def run() -> None:
        nonlocal turns
        while not is_over.is_set():
            turns += 1
            time.sleep(0)

    thread, interval = threading.Thread(target=run), sys.getswitchinterval()
    sys.setswitchinterval(60)  # who has the lock keeps it until it gives it away
    try:
        thread.start()
        before = turns
        work()
        return turns - before
    finally:
        is_over.set()
        sys.setswitchinterval(interval)
        thread.join()
