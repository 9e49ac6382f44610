"""`dgemma chat`: turns from the keyboard or a pipe, with commands that begin with a slash."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any, cast

from dgemma_ext.arguments import text as checked_text
from dgemma_ext.cli import images
from dgemma_ext.cli.answer import load_model, tokenizer_of, write_answer
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.cli.watch import visible
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine import Chat, Commit, Draft
from dgemma_ext.model.vision import PromptImage

_HELP = """\
/help         this list
/reset        begin a new conversation (with the same system message)
/system TEXT  begin a new conversation with another system message
/seed N       sample the next turns with N, N + 1, ...
/image FILE   put an image before the next message; several may be given
/watch        show the canvas settle, or stop showing it
/quit         leave (so does the end of input)
After an answer that calls tools the next lines are the results of the calls, a line for each.
Ctrl-C stops an answer; the conversation goes on as if its question had not been asked."""


def run(arguments: Arguments) -> None:
    model = load_model(arguments)
    session = _Session(model, arguments)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  gives input() its line editing and history

        _print_note("/help lists the commands; Ctrl-D leaves")
    for line in _typed_lines(session.asks_for) if interactive else _piped_lines():
        try:
            if not session.take(line.strip()):
                return
        except ValueError as error:
            # A user at a keyboard can try again; a script cannot.
            if not interactive:
                raise
            _print_note(str(error))


class _Session:
    def __init__(self, model: DiffusionGemma, arguments: Arguments) -> None:
        self._model = model
        self._arguments = arguments
        self._seed = arguments.seed
        self._turn = 0
        self._results: list[str] = []  # of the last answer's tool calls
        self._images: list[PromptImage] = []  # of the next message
        self._chat = self._begin()

    def asks_for(self) -> str:
        """What the next line is: "" for a message, else the name of the tool whose result it is."""
        calls = self._chat.tool_calls
        return calls[len(self._results)].name if len(self._results) < len(calls) else ""

    def take(self, line: str) -> bool:
        """Runs a command or answers a message. Returns False at the end of the chat."""
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            _print_note(_HELP)
        elif command == "/reset":
            self._chat = self._begin()
        elif command == "/system":
            self._arguments.system = rest.strip() or None
            self._chat = self._begin()
        elif command == "/seed":
            if not rest.strip().isdecimal():
                raise ValueError(f"/seed takes a whole number, got {rest.strip()!r}")
            self._seed, self._turn = int(rest), 0
        elif command == "/image":
            image = images.read_for_chat(self._model.vision, rest.strip(), self._arguments.image_tokens)
            self._images.append(image)
            _print_note(f"(the image takes {image.soft_tokens} tokens; it goes before the next message)")
        elif command == "/watch":
            self._arguments.watch = not self._arguments.watch
        elif command.startswith("/"):
            raise ValueError(f"{command} is not a command; /help lists them")
        elif line and self.asks_for():
            self._results.append(checked_text("the result", line))
            if not self.asks_for():
                results, self._results = self._results, []
                self._answer([{"role": "tool", "content": result} for result in results])
        elif line:
            self._answer(checked_text("the message", line), self._images)
        return True

    def _begin(self) -> Chat:
        self._turn, self._results, self._images = 0, [], []
        settings = self._arguments
        return self._model.chat(
            system=settings.system,
            max_length=settings.context,
            image_tokens=settings.image_tokens,
            **settings.prompting,
        )

    def _answer(self, turn: str | list[dict[str, Any]], given: Sequence[PromptImage] = ()) -> None:
        asked, seed = self._arguments, self._seed + self._turn
        stream = self._chat.stream(turn, asked.max_new_tokens, asked.sampler, seed, images=given or None)
        # Closing the stream before its end takes the turn back.
        with closing(cast(Generator[Draft | Commit], stream)) as events, _stop_on_interrupt() as stopped:
            try:
                output = write_answer(
                    _until(stopped, events), tokenizer_of(self._model), self._arguments, turn=self._turn
                )
            except KeyboardInterrupt:
                output = None
        if output is None:
            _print_note("(stopped; the turn is taken back)")
        else:
            self._turn += 1
            if given:
                self._images = []


def _typed_lines(asks_for: Callable[[], str]) -> Iterator[str]:
    """Yields lines from the keyboard. One Ctrl-C clears the line, a second one in a row raises KeyboardInterrupt."""
    interrupts = 0
    while interrupts < 2:
        try:
            tool = visible(asks_for())
            yield input(f"result of {tool}> " if tool else "> ")
            interrupts = 0
        except UnicodeDecodeError as error:
            _print_note(f"the line is not {error.encoding}: {error.reason}")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            interrupts += 1
            _print_note("\n(Ctrl-C again, Ctrl-D or /quit leaves)" if interrupts == 1 else "")
    raise KeyboardInterrupt


def _piped_lines() -> Iterator[str]:
    try:
        while line := sys.stdin.readline():
            yield line
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not {error.encoding}: {error.reason} at byte {error.start}") from error


def _until(stopped: Callable[[], bool], events: Iterator[Draft | Commit]) -> Iterator[Draft | Commit]:
    for event in events:
        yield event
        is_whole = isinstance(event, Commit) and event.finish_reason is not None
        if stopped() and not is_whole:
            return


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside the block, a first Ctrl-C asks for a stop after the current denoising step, a second one stops at once.

    Yields a function that tells whether a stop was asked for.
    """
    interrupts = 0

    def count(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            raise KeyboardInterrupt

    before: Any = signal.signal(signal.SIGINT, count)
    try:
        yield lambda: interrupts > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _print_note(text: str) -> None:
    """Prints to stderr, because stdout holds only the model's text."""
    print(text, file=sys.stderr, flush=True)
