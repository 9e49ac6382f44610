"""One answer as a client gets it: from the engine's commits to pieces of text, thoughts and tool calls.

Streamed or not, an answer is made of the same pieces, so both say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dgemma_ext.checkpoint import Tokenizer, ToolCall
from dgemma_ext.engine import Commit, Draft
from dgemma_ext.sampling import TokenLogprobs
from dgemma_ext.serve.stop import StopCutter

_CALL = "<|tool_call>"
# In place of bytes that are no character, such as those of a token that is a part of one.
NO_TEXT = "\ufffd"


@dataclass(frozen=True)
class TextToken:
    """A token of an answer's text, with its log-probabilities. offset: where its text begins in the answer's; that of a
    token within a character is where the character begins."""

    id: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(frozen=True)
class Piece:
    """What a canvas adds to an answer. `calls` are whole, and `finish_reason` is OpenAI's, None but for the last.
    `tokens` are those of its text, where log-probabilities were asked for."""

    text: str = ""
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    tokens: tuple[TextToken, ...] = ()


class Answer:
    """An answer so far: feeds on commits, gives pieces, and counts.

    stops: strings that end the text; they are looked for in the text alone, not in thoughts and tool calls. one_call:
    whether further calls are left out. middle: how many tokens of the answer, of one canvas, stand before a pinned
    suffix; those are the client's answer, and None means all.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stops: Sequence[str] = (),
        one_call: bool = False,
        middle: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._cutter = StopCutter(stops)
        self._one_call = one_call
        self._middle = middle
        self._call_id = _id_of(tokenizer, _CALL)
        self._calls = 0  # that pieces have told
        self._places = _Places(tokenizer)
        self._held_tokens: list[TextToken] = []  # their text is held back
        self.pieces: list[Piece] = []
        self.tokens: list[TextToken] = []
        self.logprobs: list[TokenLogprobs] = []  # of all tokens, where they were asked for
        self.cached_tokens = 0
        self.token_ids: list[int] = []
        self.denoising_steps: list[int] = []
        self.text = ""
        self.thinking = ""
        self.calls: list[ToolCall] = []
        self.finish_reason: str | None = None
        self.engine_reason: str | None = None

    def commit(self, commit: Commit) -> Piece:
        """The piece that a canvas adds. Where it has a finish_reason and the commit has none, a stop string was found
        and the request is to be cancelled."""
        if self._middle is not None:
            commit = self._before_suffix(commit, self._middle)
        begin = len(self.token_ids)
        self.token_ids += commit.token_ids
        self.denoising_steps.append(commit.denoising_steps)
        self.logprobs += commit.logprobs or ()
        self.cached_tokens = commit.request.cached_tokens
        is_last = commit.finish_reason is not None
        self.engine_reason = commit.finish_reason
        calls, unread = self._new_calls(is_last)
        text = self._cutter.feed(commit.text + unread, is_last)
        if self._cutter.found:
            self.finish_reason = "tool_calls" if self.calls or calls else "stop"
            self.engine_reason = "stop"
        elif is_last:
            is_whole = _is_whole(commit)
            called = is_whole and (self.calls or calls)
            self.finish_reason = "tool_calls" if called else "stop" if is_whole else "length"
        self.text += text
        self.thinking += commit.thinking
        self.calls += calls
        tokens = self._text_tokens(commit, begin)
        self.tokens += tokens
        self.pieces.append(Piece(text, commit.thinking, tuple(calls), self.finish_reason, tuple(tokens)))
        return self.pieces[-1]

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of thoughts, with those that open and close them."""
        return self._tokenizer.thought_tokens(self.token_ids, self._prompt_ids)

    @property
    def tokens_per_forward(self) -> float:
        return len(self.token_ids) / max(1, sum(self.denoising_steps))

    def end_of(self, draft: Draft) -> int:
        """How many tokens of a draft's canvas the answer would keep."""
        return draft.end if self._middle is None else min(draft.end, self._middle)

    def text_of(self, draft: Draft) -> str:
        """What a draft would add to the text, with what is held back of it, and up to a stop string."""
        if self._middle is None:
            return self._cutter.preview(draft.text)
        return self._cutter.preview(self._tokenizer.parse_response(draft.token_ids[: self.end_of(draft)]).text)

    def _before_suffix(self, commit: Commit, middle: int) -> Commit:
        """The commit up to the suffix. A middle that reaches it is whole, as one that ends by itself is."""
        kept = commit.token_ids[:middle]
        text = self._tokenizer.parse_response(kept).text
        reason = "deadline" if commit.finish_reason == "deadline" else "eos"
        return replace(commit, token_ids=kept, text=text, thinking="", finish_reason=reason)

    def _text_tokens(self, commit: Commit, begin: int) -> list[TextToken]:
        """The tokens whose text begins in what is certain of the text by now; none where there are no
        log-probabilities."""
        if commit.logprobs is None:
            return []
        flags = self._tokenizer.is_text(self.token_ids, self._prompt_ids)[begin:]
        tokens = self._held_tokens
        for token, logprobs, is_text in zip(commit.token_ids, commit.logprobs, flags, strict=False):
            if is_text:
                tokens.append(TextToken(token, logprobs, self._places.next(token)))
        if self.finish_reason is not None and not self._cutter.found:
            certain = len(tokens)
        else:
            certain = sum(one.offset < len(self.text) for one in tokens)
        self._held_tokens = tokens[certain:]
        return tokens[:certain]

    def _new_calls(self, is_last: bool) -> tuple[list[ToolCall], str]:
        """The calls that are new, and the text of those that cannot be read.

        The newest call may still change with the next canvas, so it waits for the one after it or the end.
        """
        if self._call_id is None or (self._call_id not in self.token_ids and not is_last):
            return [], ""
        response = self._tokenizer.parse_response(self.token_ids, prefix=self._prompt_ids)
        certain = response.tool_calls if is_last else response.tool_calls[:-1]
        if self._one_call:
            certain = certain[:1]
        new = list(certain[self._calls :])
        self._calls = max(self._calls, len(certain))
        unread = "".join(call.text for call in response.invalid_tool_calls) if is_last else ""
        return new, unread


class _Places:
    """Where tokens begin in the text of all. `next` takes them in turn."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._at = 0
        self._part: list[int] = []  # tokens of a character that is not whole yet

    def next(self, token: int) -> int:
        place = self._at
        self._part.append(token)
        text = self._tokenizer.decode(self._part)
        # A character has four bytes at most, so a longer part is none.
        if len(self._part) == 4 or not text.endswith(NO_TEXT):
            self._at += len(text)
            self._part = []
        return place


def _is_whole(commit: Commit) -> bool:
    """Whether an answer ends by itself. One that a grammar holds may be complete at its length limit too."""
    return commit.finish_reason == "eos" or (commit.finish_reason == "length" and not commit.request.is_cut)


def _id_of(tokenizer: Tokenizer, token: str) -> int | None:
    try:
        return tokenizer.id_of(token)
    except ValueError:
        return None
