"""Shows the drafts of a canvas: as pictures in a terminal, as lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.cli.palette import BACKGROUND, CAPTION, token_style
from dgemma_ext.engine import Draft

# Shown for the end of the answer, and for each token after it, which is not part of the answer.
_END, _AFTER_END = "■", "·"


class Watch:
    """Shows drafts one after the other on a console: by `picture` in a terminal, by `line` elsewhere.

    keep: whether the last picture of a canvas stays. pause: the least seconds that each picture stays.
    """

    def __init__(
        self,
        console: Console,
        picture: Callable[[Draft], RenderableType],
        line: Callable[[Draft], str],
        keep: bool = False,
        pause: float = 0.0,
    ) -> None:
        self._console = console
        self._picture = picture
        self._line = line
        self._keep = keep
        self._pause = pause
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.clear()

    def show(self, draft: Draft) -> None:
        if not self._console.is_terminal:
            self._console.print(self._line(draft), markup=False, soft_wrap=True)
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=not self._keep)
            self._live.start()
        self._live.update(self._picture(draft), refresh=True)
        time.sleep(self._pause)

    def clear(self) -> None:
        """Ends the picture, which stays with `keep`, so that other text can be written."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def status_line(draft: Draft) -> str:
    """The figures of a step. Canvases and steps count from 1; pinned positions do not count as free."""
    sampler = draft.request.sampler
    free = len(draft.token_ids) - len(pinned_positions(draft))
    return (
        f"canvas {draft.canvas_index + 1} step {draft.step}/{sampler.max_denoising_steps}, "
        f"temperature {sampler.temperature(draft.step):.2f}, mean entropy {draft.mean_entropy:.4f}, "
        f"accepted {int(draft.accepted.sum())}/{free}"
    )


def framed(draft: Draft, body: RenderableType) -> RenderableType:
    """A picture on the scale's background, with the figures of its step above it."""
    title = Text(status_line(draft))
    return Padding(Group(title, Text(), body), (0, 1), style=Style(color=CAPTION, bgcolor=BACKGROUND))


def canvas_picture(draft: Draft, tokenizer: Tokenizer) -> RenderableType:
    """The draft as running text, each token in the colour of its entropy."""
    text, ended = Text(), False
    pinned = pinned_positions(draft)
    ends = set(draft.request.sampler.eos_token_ids)
    for position, (token, entropy, accepted) in enumerate(
        zip(draft.token_ids, draft.entropy.tolist(), draft.accepted.tolist(), strict=True)
    ):
        piece = _AFTER_END if ended else _END if token in ends else token_piece(token, tokenizer)
        ended = ended or token in ends
        text.append(piece, style=token_style(entropy, accepted, position in pinned))
    return framed(draft, text)


def token_piece(token: int, tokenizer: Tokenizer) -> str:
    """One token as it may be written to a terminal."""
    return visible(tokenizer.decode([token], skip_special_tokens=False))


def pinned_positions(draft: Draft) -> set[int]:
    """The positions of this canvas that the request holds in place."""
    canvas, length = draft.request.canvas, len(draft.token_ids)
    first = draft.canvas_index * length
    pinned = () if canvas is None or canvas.pinned is None else canvas.pinned[first : first + length]
    return {position for position, is_pinned in enumerate(pinned) if is_pinned}


def visible(text: str) -> str:
    """`text` with control characters as symbols, because a model's text must not control the terminal."""
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)  # the block "control pictures" has one for each
    if code == 0x7F:
        return "␡"
    return "�" if 0x80 <= code < 0xA0 else character
