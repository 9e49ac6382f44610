"""A pytest plugin for runs on a GPU: a fault costs one test, and what was run is known.

After a fault every later call in the process fails, so the session ends there. With DGEMMA_TESTS_BEGUN=FILE a session
leaves out the tests that FILE names and adds those that it begins, so that the next one goes on behind the test that
ended this one (tools/first_light.sh); the line "finished" says that there is nothing left. A test that takes long is
taken to hang: where CUDA_COREDUMP_PIPE is set, the driver is asked to write down where its kernels are.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

# Below tools/first_light.sh's limit for a test, 40 s.
HANGS_AFTER_SECONDS = 33.0
_timer: threading.Timer | None = None


def _begun() -> Path | None:
    name = os.environ.get("DGEMMA_TESTS_BEGUN")
    return Path(name) if name else None


def _add(line: str) -> None:
    if (file := _begun()) is not None:
        with file.open("a", encoding="utf-8") as out:
            print(line, file=out)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = _begun()
    before = set(file.read_text(encoding="utf-8").splitlines()) if file is not None and file.exists() else set()
    left_out = [item for item in items if item.nodeid in before]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in before]


def _ask_for_dump(pipe: str) -> None:
    """A byte through the pipe asks for it; nobody may be there to read it."""
    with suppress(OSError):
        file = os.open(pipe.replace("%p", str(os.getpid())), os.O_WRONLY | os.O_NONBLOCK)
        os.write(file, b"0")
        os.close(file)


def pytest_runtest_logstart(nodeid: str) -> None:
    global _timer
    _add(nodeid)
    if pipe := os.environ.get("CUDA_COREDUMP_PIPE"):
        _timer = threading.Timer(HANGS_AFTER_SECONDS, _ask_for_dump, (pipe,))
        _timer.daemon = True
        _timer.start()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    if _timer is not None:
        _timer.cancel()
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the GPU can no longer be used after {nodeid}: {str(error).splitlines()[0]}")


def pytest_sessionfinish(exitstatus: int) -> None:
    if exitstatus != pytest.ExitCode.INTERRUPTED:
        _add("finished")
