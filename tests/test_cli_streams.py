"""The command `dgemma` where its surroundings lack something: a stream, a locale, a home, an encoding."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from command import dgemma, random_checkpoint
from dgemma_ext import demo

SHORT = ["--max-new-tokens", "4", "--steps", "1"]
PROGRAM = [sys.executable, "-c", "from dgemma_ext.cli import main; raise SystemExit(main())"]
# Nothing that a shell usually sets; Python is to take the locale as it is.
BARE = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def started_bare(*arguments: str | bytes, redirect: str = "") -> subprocess.CompletedProcess[bytes]:
    """Runs the command through a shell that closes streams, without an environment."""
    shell = ["/bin/sh", "-c", f'exec "$@" {redirect}', "sh"]
    command: Sequence[str | bytes] = [*shell, *PROGRAM, *arguments]
    return subprocess.run(command, env=BARE, stdin=subprocess.DEVNULL, capture_output=True, check=False)


def test_a_closed_stdout_is_one_line_and_nothing_is_loaded() -> None:
    run = started_bare("generate", random_checkpoint(), "x", *SHORT, redirect=">&-")
    assert run.returncode == 2
    assert run.stderr == b"dgemma: standard output is closed; send it to a file, a pipe or /dev/null\n"


def test_closed_stdin_and_stderr_and_no_home_are_no_error() -> None:
    """In the locale C, whose encoding is ASCII, and with a terminal's pictures asked for."""
    run = started_bare("demo", "--size", "6", "--seed", "1", redirect="<&- 2>&-")
    assert run.returncode == 0
    assert b"solved: every row, column and box is right" in run.stdout
    assert run.stdout.isascii()


def test_bytes_that_are_not_text_are_one_line_in_any_locale() -> None:
    run = started_bare("generate", random_checkpoint(), b"\xff\xfe", *SHORT)
    assert (run.returncode, run.stdout) == (2, b"")
    assert run.stderr.startswith(b"dgemma: PROMPT must be text that UTF-8 can hold")
    assert run.stderr.count(b"\n") == 1
    for errors in ("strict", "surrogateescape"):  # of stdin, in a UTF-8 locale and in the locale C
        typed = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8", errors=errors)
        found = dgemma("generate", random_checkpoint(), "-", *SHORT, stdin=typed)
        assert (found.code, found.out) == (2, "")
        assert found.err.count("\n") == 1


def test_streams_that_python_lacks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Python shows a closed stream as None; an empty stdin is what is left."""
    from dgemma_ext.cli import main

    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", random_checkpoint(), "-", *SHORT]) == 2
    assert capfd.readouterr().err == "dgemma: PROMPT is empty\n"
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", random_checkpoint(), *SHORT]) == 0
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["generate", random_checkpoint(), "x", *SHORT, "--watch"]) == 0


def test_a_lone_surrogate_ends_a_piped_chat_with_one_line() -> None:
    run = dgemma("chat", random_checkpoint(), *SHORT, "--json", stdin="one\n\udcff\n")
    assert run.code == 2
    assert len(run.objects) == 1
    assert "lone surrogate" in run.err
    assert run.err.count("\n") == 1
    assert dgemma("generate", random_checkpoint(), "x", "--system", "\udcff").code == 2
    assert dgemma("info", "\udcff/nothing").code == 2


def test_a_home_folder_that_is_not_known_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HOME")
    assert dgemma("info", str(demo.checkpoint(6))).code == 0
    run = dgemma("info", "~nobody-of-this-name/model")
    assert (run.code, run.err.count("\n")) == (2, 1)
    assert "~nobody-of-this-name/model: is no folder here" in run.err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").symlink_to(os.fspath(demo.checkpoint(6)))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dgemma("info", "~/home").code == 0


@pytest.mark.parametrize(
    ("name", "canvas"),
    [("6x6", 37), ("9x9", 82), ("demo", 82)],
)
def test_bundled_models_have_names_in_every_command(name: str, canvas: int, tmp_path: Path) -> None:
    assert dgemma("info", name, "--json").object["checkpoint"]["canvas_length"] == canvas
    assert dgemma("generate", name, "x", "--steps", "1", "--json").object["denoising_steps"] == [1]
    assert dgemma("chat", name, "--steps", "1", "--json", stdin="x\n").object["denoising_steps"] == [1]
    assert dgemma("demo", "--model", name, "--seed", "1", "--json").object["size"] ** 2 + 1 == canvas
    assert dgemma("quantize", name, str(tmp_path / "out"), "--to", "fp8", "--json").code == 0
