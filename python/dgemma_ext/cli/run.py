"""Runs a subcommand and turns what it raises into one line on stderr and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from dgemma_ext.cli import chat, demo, generate, info, profile, quantize
from dgemma_ext.cli.arguments import Arguments, build_parser
from dgemma_ext.engine import NotEnoughMemory
from dgemma_ext.errors import CheckpointError

_COMMANDS: dict[str, Callable[[Arguments], None]] = {
    "generate": generate.run,
    "chat": chat.run,
    "info": info.run,
    "demo": demo.run,
    "quantize": quantize.run,
    "profile": profile.run,
}

FAILED = 1
BAD_INPUT = 2
# What a shell reports for a program that a signal ended: 128 and the signal's number.
INTERRUPTED = 128 + signal.SIGINT
OUTPUT_CLOSED = 128 + 13  # SIGPIPE, which Windows has no name for


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `dgemma` with these arguments (default: the command line's).

    0: done; 1: failed; 2: an argument, an input or a checkpoint that cannot be used; 130: interrupted.
    """
    try:
        arguments = build_parser().parse_args(argv, namespace=Arguments())
    except SystemExit as leaving:  # argparse has printed its help or its complaint
        return leaving.code if isinstance(leaving.code, int) else BAD_INPUT
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write characters that the terminal's encoding does not have.
        sys.stdout.reconfigure(errors="replace")
    try:
        _COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader is gone (`dgemma ... | head`), and Python flushes stdout once more when it leaves.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED
    except (ValueError, CheckpointError) as error:
        return _complain(str(error), BAD_INPUT)
    except NotEnoughMemory as error:  # with its table
        print(f"dgemma: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:  # whatever else fails is told in one line too
        return _complain(f"{type(error).__name__}: {error} (DGEMMA_DEBUG=1 shows where)", FAILED)
    return 0


def _complain(problem: str, code: int) -> int:
    if os.environ.get("DGEMMA_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    print("dgemma: " + " ".join(problem.split()), file=sys.stderr)
    return code
