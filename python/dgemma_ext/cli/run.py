"""Runs a subcommand and turns exceptions into one line on stderr and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from dgemma_ext.cli import chat, decide, demo, finetune, generate, grammar, info, profile, quantize, serve
from dgemma_ext.cli.arguments import Arguments, build_parser
from dgemma_ext.engine import NotEnoughMemory
from dgemma_ext.environment import check_environment, debug
from dgemma_ext.errors import CheckpointError

_COMMANDS: dict[str, Callable[[Arguments], None]] = {
    "generate": generate.run,
    "chat": chat.run,
    "decide": decide.run,
    "grammar": grammar.run,
    "info": info.run,
    "demo": demo.run,
    "quantize": quantize.run,
    "finetune": finetune.run,
    "profile": profile.run,
    "serve": serve.run,
}

FAILED = 1
BAD_INPUT = 2
# A shell reports 128 plus the signal's number for a program that a signal ended.
INTERRUPTED = 128 + signal.SIGINT
OUTPUT_CLOSED = 128 + 13  # SIGPIPE, which Python's signal module does not have on Windows


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `dgemma` with these arguments (default: the command line's).

    0: done; 1: failed; 2: an argument, an input or a checkpoint that cannot be used; 130: interrupted.
    """
    if not _open_streams():
        return _report("standard output is closed; send it to a file, a pipe or /dev/null", BAD_INPUT)
    try:
        arguments = build_parser().parse_args(argv, namespace=Arguments())
    except SystemExit as leaving:  # argparse has printed its help or an error
        return leaving.code if isinstance(leaving.code, int) else BAD_INPUT
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write characters that the terminal's encoding does not have.
        sys.stdout.reconfigure(errors="replace")
    try:
        check_environment()
        _COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe (`dgemma ... | head`), and Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED
    except (ValueError, CheckpointError) as error:
        return _report(str(error), BAD_INPUT)
    except NotEnoughMemory as error:  # printed with the line breaks of its table
        print(f"dgemma: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:
        return _report(f"{type(error).__name__}: {error} (DGEMMA_DEBUG=1 shows where)", FAILED)
    return 0


def _open_streams() -> bool:
    """Puts /dev/null where stdin or stderr is closed (`dgemma ... <&-`), which Python shows as None. Returns whether
    stdout is open."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  for the rest of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return sys.stdout is not None


def _report(message: str, code: int) -> int:
    """Prints an error in one line and returns the exit code."""
    if debug():
        traceback.print_exc()
    print("dgemma: " + " ".join(message.split()), file=sys.stderr)
    return code
