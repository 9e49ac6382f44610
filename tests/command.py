"""Running the command `dgemma` in tests: inside this process, or as a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import dgemma_ext as dg
from checkpoints import make_checkpoint
from dgemma_ext.cli import main

# Variables that would change the form of the output.
for _name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "DGEMMA_DEBUG", "COLUMNS", "LINES"):
    os.environ.pop(_name, None)

CANVAS = 8
ESCAPE = "\x1b"  # every colour code and cursor movement begins so


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Stdout as JSON, an object per line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def object(self) -> dict[str, Any]:
        (only,) = self.objects
        return only


def dgemma(*arguments: str, stdin: str | io.TextIOBase = "") -> Run:
    """Runs a command in this process, with stdin, stdout and stderr that are not terminals."""
    before, sys.stdin = sys.stdin, io.StringIO(stdin) if isinstance(stdin, str) else stdin
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(arguments)
    finally:
        sys.stdin = before
    return Run(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def started(*arguments: str, **settings: Any) -> Iterator[Any]:
    """Starts a process with pipes for stdin, stdout and stderr, and kills it at the end."""
    # A shell's background job ignores SIGINT and passes that on to its children; here SIGINT must interrupt.
    program = """if True:
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from dgemma_ext.cli import main
        raise SystemExit(main())
    """
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], text=True, **(pipes | settings))
    with process:
        try:
            yield process
        finally:
            process.kill()


@cache
def random_checkpoint(**sizes: Any) -> str:
    """The folder of a random checkpoint with a canvas of 8; it lasts as long as this process."""
    folder = tempfile.TemporaryDirectory()
    _folders.append(folder)
    return str(make_checkpoint(Path(folder.name), **({"canvas": CANVAS} | sizes)))


_folders: list[tempfile.TemporaryDirectory[str]] = []


@cache
def library_model() -> dg.DiffusionGemma:
    """The random checkpoint as the library loads it."""
    return dg.DiffusionGemma.from_pretrained(random_checkpoint())
