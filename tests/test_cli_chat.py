"""`dgemma chat`: turns from a pipe and from a keyboard, its commands, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import dgemma_ext as dg
from command import dgemma, library_model, random_checkpoint, started
from dgemma_ext.cli import main
from dgemma_ext.cli.answer import write_answer

SHORT = ["--max-new-tokens", "8", "--steps", "2"]
# A threshold that is never met, so that every canvas takes all its steps.
UNSURE = ["--confidence-threshold", "0"]


def answers(*texts: str, seed: int = 0, system: str | None = None, **sampler_fields: float) -> list[str]:
    """The answers of the library's chat to the same turns."""
    chat = library_model().chat(system=system)
    sampler = dg.SamplerConfig(max_denoising_steps=2, **sampler_fields)  # type: ignore[arg-type]
    return [chat.send(text, max_new_tokens=8, sampler=sampler, seed=seed + i) for i, text in enumerate(texts)]


def test_piped_chat_is_the_library_s_conversation() -> None:
    run = dgemma("chat", random_checkpoint(), "--json", *SHORT, stdin="hello\n\nthe sky\n")
    assert (run.code, run.err) == (0, "")
    assert [turn["turn"] for turn in run.objects] == [0, 1]
    assert [turn["text"] for turn in run.objects] == answers("hello", "the sky")


def test_chat_commands() -> None:
    typed = "/seed 7\none\ntwo\n/reset\none\n/system Be brief.\none\n/help\n/quit\nnever read\n"
    run = dgemma("chat", random_checkpoint(), "--json", *SHORT, stdin=typed)
    assert run.code == 0
    assert [turn["text"] for turn in run.objects] == [
        *answers("one", "two", seed=7),
        *answers("one", seed=7),
        *answers("one", seed=7, system="Be brief."),
    ]
    for command in ("/help", "/reset", "/system", "/seed", "/watch", "/quit"):
        assert command in run.err


def test_watch_can_be_switched_on_in_a_chat() -> None:
    run = dgemma("chat", random_checkpoint(), *SHORT, stdin="one\n/watch\ntwo\n/watch\nthree\n")
    assert run.code == 0
    assert 1 <= run.err.count("canvas 1 step ") <= 2


@pytest.mark.parametrize("line", ["/sing", "/seed x", "x" * 9000])
def test_a_bad_line_ends_a_piped_chat(line: str) -> None:
    run = dgemma("chat", random_checkpoint(), "--json", *SHORT, stdin=f"one\n{line}\ntwo\n")
    assert run.code == 2
    assert len(run.objects) == 1
    assert run.err.count("\n") == 1


class Keyboard(io.StringIO):
    """A stdin that reports a terminal; its lines come through input()."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lines: Sequence[str | type[BaseException]]) -> None:
        super().__init__()
        self._lines = iter(lines)
        monkeypatch.setattr(sys, "stdin", self)
        monkeypatch.setattr("builtins.input", self._next)

    def isatty(self) -> bool:
        return True

    def _next(self, prompt: str) -> str:
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


@pytest.mark.parametrize(
    ("lines", "code"),
    [([EOFError], 0), ([KeyboardInterrupt, "hello", EOFError], 0), ([KeyboardInterrupt, KeyboardInterrupt], 130)],
)
def test_leaving_a_typed_chat(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: list[str | type[BaseException]],
    code: int,
) -> None:
    Keyboard(monkeypatch, lines)
    assert main(["chat", random_checkpoint(), *SHORT]) == code
    assert bool(capsys.readouterr().out.strip()) == ("hello" in lines)


def test_a_bad_typed_line_is_told_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Keyboard(monkeypatch, ["x" * 9000, "/sing", "hello"])
    assert main(["chat", random_checkpoint(), "--json", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(out)["text"]] == answers("hello")
    assert "max_length" in err or "context" in err
    assert "/sing" in err


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(monkeypatch: pytest.MonkeyPatch, presses: int) -> None:
    original = dg.Chat.stream

    def interrupted(self: dg.Chat, text: str, *rest: Any, **named: Any) -> Iterator[dg.Draft | dg.Commit]:
        for event in original(self, text, *rest, **named):
            if text == "stop me":
                for _ in range(presses):
                    os.kill(os.getpid(), signal.SIGINT)
            yield event

    monkeypatch.setattr(dg.Chat, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    run = dgemma("chat", random_checkpoint(), "--json", *SHORT, *UNSURE, stdin="one\nstop me\ntwo\n")
    assert signal.getsignal(signal.SIGINT) is before
    assert run.code == 0
    assert run.err.count("stopped") == 1
    # The result is as if the stopped question had not been asked, also for the seed of the next turn.
    assert [turn["text"] for turn in run.objects] == answers("one", "two", confidence_threshold=0.0)


def test_an_interrupt_that_comes_with_the_last_step_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(events: Any, *rest: Any, **fields: Any) -> Any:
        def late() -> Iterator[dg.Draft | dg.Commit]:
            for event in events:
                if isinstance(event, dg.Commit) and event.finish_reason is not None:
                    os.kill(os.getpid(), signal.SIGINT)
                yield event

        return write_answer(late(), *rest, **fields)

    monkeypatch.setattr("dgemma_ext.cli.chat.write_answer", interrupted)
    run = dgemma("chat", random_checkpoint(), "--json", *SHORT, stdin="one\ntwo\n")
    assert [turn["text"] for turn in run.objects] == answers("one", "two")


def test_a_real_interrupt_stops_a_real_answer() -> None:
    with started("chat", random_checkpoint(), "--max-new-tokens", "3000", "--watch", *UNSURE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        for _ in range(2):
            process.stdin.write("hello\n")
            process.stdin.flush()
            assert process.stderr.readline().startswith("canvas 1 step 1/")
            process.send_signal(signal.SIGINT)
            while "(stopped" not in (line := process.stderr.readline()):
                assert line.startswith("canvas"), line
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0
