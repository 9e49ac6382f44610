"""An answer's way through its grammar: the checks of its submission, and what holds each of its canvases to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

from torch import Tensor

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.errors import GrammarError
from dgemma_ext.sampling import (
    CLOSE,
    FAILED,
    OPEN,
    THINK,
    AnswerShape,
    Canvas,
    Choice,
    CompiledGrammar,
    Constraint,
    Grammar,
    ResolvedSampler,
    Spellings,
    choice_scores,
    closing,
    compile_grammar,
    grammars_of_canvases,
    spellings_of,
    tokenizer_vocabulary,
)


class Matching:
    """One answer and its grammar. `content` is the answer's canvas with what may follow the text.

    start: the grammar's state at the answer's beginning. by_end: grammars with other distances than the compiled one's,
    by the position where a canvas ends.
    """

    def __init__(
        self,
        grammar: Grammar,
        compiled: CompiledGrammar,
        start: int,
        content: Canvas,
        shape: AnswerShape,
        by_end: Mapping[int, CompiledGrammar],
    ) -> None:
        self.grammar, self.compiled, self.content = grammar, compiled, content
        self._shape, self._by_end = shape, by_end
        self._state = start
        self._begins_in_text = start == compiled.start

    def constraint(self, begin: int, length: int) -> Constraint:
        """What holds the canvas of `length` positions from `begin` on to the grammar."""
        end, budget = begin + length, self._shape.thinking_budget
        compiled, tokens_left = self._by_end.get(end, self.compiled), max(self._shape.longest - end, 0)
        return Constraint(compiled, self._state, tokens_left, None if budget is None else budget - begin)

    def choice_scores(
        self, tokenizer: Tokenizer, before: Sequence[int], draft: Sequence[int], logits: Tensor, softcap: float
    ) -> dict[str, float] | None:
        """The scores of a dg.Choice's texts after a canvas, given what stands before the answer; None within a thought.

        before: the answer's tokens before the canvas. logits: raw, [L, vocabulary], of the canvas's last step.
        """
        begin = self._text_begin(tokenizer, [*before, *draft])
        if not isinstance(self.grammar, Choice) or begin is None:
            return None
        vocabulary = tokenizer_vocabulary(tokenizer, logits.shape[-1])
        said = b"".join(vocabulary.texts[token] or b"" for token in before[begin:])
        texts = {text: text.encode() for text in self.grammar.choices}
        rests = {text: own[len(said) :] if own.startswith(said) else None for text, own in texts.items()}
        first, length = max(begin, len(before)), len(before) + len(draft)
        ends = [token for token in self._shape.end_ids if token != self.compiled.pad_id]
        room = max(min(self._shape.longest, length) - first, 0)
        own_logits = logits[first - len(before) :]
        given = (self.content, first, room, ends, self.compiled.pad_id)
        spell = partial(_spellings, tokenizer, logits.shape[-1])
        return choice_scores(rests, spell, own_logits, softcap, *given)

    def _text_begin(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> int | None:
        """Where an answer's text begins, behind its thought; None where the thought is open."""
        markers = tokenizer.markers
        if self._begins_in_text and tokens[0] != markers.get(OPEN):
            return 0
        close = markers.get(CLOSE)
        return next((index + 1 for index, token in enumerate(tokens) if token == close), None)

    @property
    def goes_on(self) -> bool:
        """Whether more than its end could follow what the canvases so far have said."""
        begin, end = self.compiled.out_begin[self._state], self.compiled.out_begin[self._state + 1]
        return bool((self.compiled.out_target[begin:end] != self.compiled.end).any())

    def follow(self, draft: Sequence[int]) -> bool:
        """Walks a finished canvas through the grammar once more. Returns whether it matches."""
        self._state = self.compiled.walk(self._state, draft)
        return self._state != FAILED


@lru_cache(maxsize=1024)
def _spellings(tokenizer: Tokenizer, vocabulary_size: int, text: bytes) -> Spellings:
    return spellings_of(text, tokenizer_vocabulary(tokenizer, vocabulary_size))


def matching_of(
    grammar: Grammar,
    tokenizer: Tokenizer,
    vocabulary_size: int,
    pad_id: int | None,
    prompt_ids: Sequence[int],
    sampler: ResolvedSampler,
    max_new_tokens: int,
    canvas: Canvas | None,
) -> Matching:
    """Compiles a grammar for an answer of at most so many tokens.

    Where the prompt has begun a thought or a call, the answer goes on with it. Raises GrammarError where the grammar
    does not, where it cannot be compiled, and where pinned and allowed tokens leave no text that matches; ValueError,
    with both numbers, where its shortest text or its shortest thought has more tokens.
    """
    begun = tokenizer.open_part(prompt_ids)
    thinks = tokenizer.markers.get(THINK) in prompt_ids or bool(begun)
    compiled = compile_grammar(grammar, tokenizer, vocabulary_size, sampler.eos_token_ids, pad_id, thinks)
    start = compiled.walk(compiled.start, begun)
    if start == FAILED:
        raise GrammarError("it does not go on with the thought or the tool call that the prompt has begun")
    if compiled.distance[start] > max_new_tokens:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, and the shortest text that the grammar matches has "
            f"{compiled.distance[start]} tokens"
        )
    needed, budget = 0 if compiled.closing is None else compiled.closing[start], grammar.thinking_budget
    if budget is not None and needed > budget:
        raise ValueError(f"thinking_budget is {budget}, and the shortest thought has {needed} tokens")
    content = canvas or Canvas()
    certain = content.certain_length(sampler.eos_token_ids)
    longest = max_new_tokens if certain is None else min(max_new_tokens, certain)
    count = -(-longest // sampler.canvas_length)
    ends = [index * sampler.canvas_length + sampler.length_of(index, longest) for index in range(count)]
    end_ids = sorted({*sampler.eos_token_ids, *([] if compiled.pad_id is None else [compiled.pad_id])})
    shape = AnswerShape(longest, ends, end_ids, grammar.thinking_budget)
    by_end = grammars_of_canvases(compiled, start, content, shape)
    if by_end is None:
        raise GrammarError(
            "canvas has pinned and allowed tokens with which no text that the grammar matches ends within "
            f"{longest} tokens"
        )
    return Matching(grammar, compiled, start, closing(content, longest, ends[-1], end_ids), shape, by_end)
