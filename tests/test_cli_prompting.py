"""The command's flags for the chat template, and how it shows thoughts and tool calls."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chats import LOOK, answering, pinned, prompts_of
from command import ESCAPE, dgemma, library_model, random_checkpoint
from dgemma_ext.cli.answer import write_answer
from dgemma_ext.cli.arguments import Arguments, build_parser
from test_cli_chat import Keyboard

SHORT = ["--max-new-tokens", "8", "--steps", "1"]
ANSWER = "<|channel>thought\nLet me\nsee.\n<channel|>One moment.<turn|>"
CALLS = (
    '<|channel>thought\nHm.\n<channel|>Look:<|tool_call>call:look{what:<|"|>ü\x1b<|"|>}<tool_call|>'
    "<|tool_call>call:look{}<tool_call|><|tool_response>"
)
CALL_LINES = ['{"name": "look", "arguments": {"what": "ü\\u001b"}}', '{"name": "look", "arguments": {}}']


@pytest.fixture
def tools(tmp_path: Path) -> str:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([LOOK]))
    return str(file)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_flags_reach_the_template(monkeypatch: pytest.MonkeyPatch, tools: str, command: str) -> None:
    tokenizer = library_model().tokenizer
    assert tokenizer is not None
    text = "Is <turn|> a token?"
    prompt, stdin = ([text], "") if command == "generate" else ([], text + "\n")
    for flags, options in (
        ([], {}),
        (["--thinking"], {"enable_thinking": True}),
        (["--tools", tools], {"tools": [LOOK]}),
        (["--template-variable", "enable_thinking=true"], {"enable_thinking": True}),
        (["--special-tokens", "tokens", "--thinking"], {"enable_thinking": True, "special_tokens": "tokens"}),
    ):
        with monkeypatch.context() as patched:
            seen = prompts_of(patched)
            assert dgemma(command, random_checkpoint(), *prompt, *SHORT, *flags, stdin=stdin).code == 0
        expected = tokenizer.encode_prompt(text, **options)  # type: ignore[arg-type]
        assert seen[-1] == expected


@pytest.mark.parametrize("form", [[LOOK], LOOK, {"tools": [LOOK]}, {"tools": [LOOK["function"]]}])
def test_forms_of_the_tools_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: Any) -> None:
    tokenizer = library_model().tokenizer
    assert tokenizer is not None
    (tmp_path / "tools.json").write_text(json.dumps(form))
    seen = prompts_of(monkeypatch)
    assert dgemma("generate", random_checkpoint(), "hi", *SHORT, "--tools", str(tmp_path / "tools.json")).code == 0
    assert seen[-1] == tokenizer.encode_prompt("hi", tools=[LOOK])


@pytest.mark.parametrize(
    ("flags", "piece"),
    [
        (["--tools", "no-such.json"], "--tools: no-such.json"),
        (["--tools", __file__], f"--tools: {__file__}: "),
        (["--tools", "BAD"], "tools[0]['function']['name'] must be a name without braces, got None"),
        (["--template-variable", "x"], "must be NAME=VALUE, got 'x'"),
        (["--template-variable", "a-b=1"], "must be NAME=VALUE, got 'a-b=1'"),
        (["--template-variable", "topic=1"], "topic is given, but the chat template"),
        (["--template-variable", "messages=[]"], "chat_template_kwargs has messages"),
        (["--thinking", "--template-variable", "enable_thinking=1"], "chat_template_kwargs has enable_thinking"),
        (["--special-tokens", "none"], "--special-tokens"),
    ],
)
def test_flags_that_cannot_be_used(tmp_path: Path, flags: list[str], piece: str) -> None:
    (tmp_path / "bad.json").write_text('[{"description": "nameless"}]')
    flags = [str(tmp_path / "bad.json") if flag == "BAD" else flag for flag in flags]
    run = dgemma("generate", random_checkpoint(), "hi", *flags)
    assert (run.code, run.out) == (2, "")
    assert run.err.count("\n") == 1
    assert piece in run.err


@pytest.mark.parametrize(("flags", "thoughts"), [([], ""), (["--thinking"], "Let me\nsee.\n")])
def test_thoughts_are_shown_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], thoughts: str
) -> None:
    answering(monkeypatch, ANSWER, ANSWER)
    run = dgemma("generate", random_checkpoint(), "hi", *flags)
    assert (run.code, run.out, run.err) == (0, "One moment.\n", thoughts)
    result = dgemma("generate", random_checkpoint(), "hi", "--json", *flags)
    assert result.err == ""
    assert (result.object["text"], result.object["thinking"]) == ("One moment.", "Let me\nsee.")


def test_thoughts_are_dimmed_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    answering(monkeypatch, "<|channel>thought\nHm\x1b.\n<channel|>Yes.<turn|>")
    run = dgemma("generate", random_checkpoint(), "hi", "--thinking")
    assert (run.out, run.err) == ("Yes.\n", f"{ESCAPE}[2mHm␛.{ESCAPE}[0m\n")


def test_thoughts_that_are_cut_short_end_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    model = library_model()
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(ANSWER, special_tokens="tokens")
    events = itertools.islice(model.stream("hi", canvas=pinned(ids)), 5)  # of its first canvases
    arguments = build_parser().parse_args(["generate", "MODEL", "hi", "--thinking"], namespace=Arguments())
    assert write_answer(events, model.tokenizer, arguments) is None
    out, err = capsys.readouterr()
    assert out == ""
    assert "Let me\nsee.\n".startswith(err.removesuffix("\n"))
    assert err.count("\n", len(err) - 1) == 1


def test_tool_calls_are_lines_of_json(monkeypatch: pytest.MonkeyPatch, tools: str) -> None:
    answering(monkeypatch, CALLS, CALLS, CALLS.replace("Look:", ""))
    run = dgemma("generate", random_checkpoint(), "hi", "--tools", tools)
    assert (run.code, run.err) == (0, "")
    assert run.out.splitlines() == ["Look:", *CALL_LINES]
    result = dgemma("generate", random_checkpoint(), "hi", "--tools", tools, "--json").object
    assert [json.dumps(call, ensure_ascii=False) for call in result["tool_calls"]] == CALL_LINES
    assert (result["text"], result["invalid_tool_calls"]) == ("Look:", [])
    assert dgemma("generate", random_checkpoint(), "hi", "--tools", tools).out.splitlines() == CALL_LINES


def test_a_terminal_shows_text_and_calls_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tools: str
) -> None:
    from dgemma_ext.cli import main

    for answer in (CALLS, CALLS.replace("Look:", "Look:\n"), CALLS.replace("Look:", "")):
        answering(monkeypatch, answer)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(["generate", random_checkpoint(), "hi", "--tools", tools]) == 0
        assert capsys.readouterr().out.splitlines() == ["Look:"] * ("Look" in answer) + CALL_LINES
        monkeypatch.undo()


def test_a_call_that_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = "So:<|tool_call>call:look{\x1b}<tool_call|><turn|>"
    answering(monkeypatch, bad, bad)
    run = dgemma("generate", random_checkpoint(), "hi")
    assert (run.code, run.out) == (0, "So:\n")
    assert run.err == "dgemma: a tool call cannot be read, it ends before :: <|tool_call>call:look{␛}<tool_call|>\n"
    assert dgemma("generate", random_checkpoint(), "hi", "--json").object["invalid_tool_calls"] == [
        {"text": "<|tool_call>call:look{\x1b}<tool_call|>", "error": "it ends before :"}
    ]


def test_watched_json_has_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, ANSWER)
    *events, result = dgemma("generate", random_checkpoint(), "hi", "--json", "--watch").objects
    commits = [event for event in events if event["event"] == "commit"]
    assert "".join(commit["thinking"] for commit in commits) == result["thinking"] == "Let me\nsee."
    assert "".join(commit["text"] for commit in commits) == result["text"] == "One moment."
    assert all("thinking" in event for event in events)


# Chats ----------------------------------------------------------------------------------------------------------------


def test_lines_after_calls_are_their_results(monkeypatch: pytest.MonkeyPatch, tools: str) -> None:
    seen = answering(monkeypatch, CALLS, "Fine.<turn|>", "Bye.<turn|>")
    run = dgemma("chat", random_checkpoint(), "--tools", tools, stdin="hi\nfirst\n\nsecond\nbye\n")
    assert (run.code, run.err) == (0, "")
    assert run.out.splitlines() == ["Look:", *CALL_LINES, "Fine.", "Bye."]
    tokenizer = library_model().tokenizer
    assert tokenizer is not None
    prompt = tokenizer.decode(seen[1], skip_special_tokens=False)
    results = [f'response:look{{value:<|"|>{result}<|"|>}}' for result in ("first", "second")]
    assert prompt.endswith("".join(f"<|tool_response>{result}<tool_response|>" for result in results))


def test_a_new_conversation_waits_for_no_result(monkeypatch: pytest.MonkeyPatch, tools: str) -> None:
    seen = answering(monkeypatch, CALLS, "Fine.<turn|>")
    run = dgemma("chat", random_checkpoint(), "--tools", tools, stdin="hi\nfirst\n/reset\nhello\n")
    assert (run.code, run.out.splitlines()[-1]) == (0, "Fine.")
    tokenizer = library_model().tokenizer
    assert tokenizer is not None
    assert seen[1] == tokenizer.encode_prompt("hello", tools=[LOOK])


def test_the_keyboard_is_asked_for_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tools: str
) -> None:
    from dgemma_ext.cli import main

    answering(monkeypatch, CALLS, "Fine.<turn|>")
    prompts: list[str] = []
    keyboard = Keyboard(monkeypatch, ["hi", "first", "second", EOFError])
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or keyboard._next(prompt))
    assert main(["chat", random_checkpoint(), "--tools", tools]) == 0
    assert prompts == ["> ", "result of look> ", "result of look> ", "> "]
    assert capsys.readouterr().out.splitlines()[-2:] == ["Fine.", ""]


# Text that is not UTF-8 -----------------------------------------------------------------------------------------------


def piped(text: bytes, errors: str = "strict") -> Any:
    return io.TextIOWrapper(io.BytesIO(text), encoding="utf-8", errors=errors)


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["\udcff\udcfe"], "", r"PROMPT must be text that UTF-8 can hold, got a lone surrogate, '\\udcff'"),
        (["hi", "--system", "\udcff"], "", r"messages\[0\]\['content'\] must be text that UTF-8 can hold"),
        (["-"], piped(b"a\xff"), "stdin is not utf-8: invalid start byte at byte 1"),
        (["-"], piped(b"a\xff", "surrogateescape"), r"PROMPT must be text that UTF-8 can hold, .*at character 1"),
    ],
)
def test_a_prompt_of_other_bytes_is_one_clear_line(arguments: list[str], stdin: Any, message: str) -> None:
    """Python passes on bytes of the command line that are not UTF-8 as lone surrogates, and some of stdin's."""
    run = dgemma("generate", random_checkpoint(), *arguments, stdin=stdin)
    assert (run.code, run.out) == (2, "")
    assert re.fullmatch(f"dgemma: {message}[^\n]*\n", run.err), run.err


def test_a_typed_byte_does_not_end_a_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dgemma_ext.cli import main

    answering(monkeypatch, "One.<turn|>", "Two.<turn|>")
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    Keyboard(monkeypatch, ["a", broken, "\udcff", "b", EOFError])
    assert main(["chat", random_checkpoint(), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["text"] for line in out.split("\n") if line] == ["One.", "Two."]
    assert "the line is not utf-8: invalid start byte" in err
    assert "the message must be text that UTF-8 can hold, got a lone surrogate" in err
    assert [json.loads(line)["turn"] for line in out.split("\n") if line] == [0, 1]


def test_a_piped_chat_ends_at_other_bytes() -> None:
    run = dgemma("chat", random_checkpoint(), "--json", *SHORT, stdin=piped(b"a\n\xff\nb\n"))
    assert run.code == 2
    assert "stdin is not utf-8" in run.err


def test_a_typed_byte_in_a_real_terminal() -> None:
    """Line editing included: readline decodes what is typed."""
    program = "import sys; from dgemma_ext.cli import main; raise SystemExit(main(sys.argv[1:]))"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", program, "chat", random_checkpoint(), "--json", *SHORT]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict", "TERM": "dumb"}
    shown = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as chat:
        os.close(theirs)
        os.write(ours, b"\xff\xfe\nhello\n/quit\n")
        with contextlib.suppress(OSError):  # what a terminal reads after its last writer has closed it
            while piece := os.read(ours, 4096):
                shown += piece
        os.close(ours)
    assert chat.returncode == 0, shown
    assert b"the line is not utf-8" in shown
    assert shown.count(b'"event": "result"') == 1
    assert b'"turn": 0' in shown
