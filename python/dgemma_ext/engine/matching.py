"""An answer's way through its grammar: the checks of its submission, and what holds each of its canvases to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.errors import GrammarError
from dgemma_ext.sampling import (
    FAILED,
    AnswerShape,
    Canvas,
    CompiledGrammar,
    Constraint,
    Grammar,
    ResolvedSampler,
    closing,
    compile_grammar,
    grammars_of_canvases,
)


class Matching:
    """One answer and its grammar. `content` is the answer's canvas with what may follow the text.

    by_end: grammars with other distances than the compiled one's, by the position where a canvas ends.
    """

    def __init__(
        self,
        grammar: Grammar,
        compiled: CompiledGrammar,
        content: Canvas,
        shape: AnswerShape,
        by_end: Mapping[int, CompiledGrammar],
    ) -> None:
        self.grammar, self.compiled, self.content = grammar, compiled, content
        self._shape, self._by_end = shape, by_end
        self._state = compiled.start

    def constraint(self, begin: int, length: int) -> Constraint:
        """What holds the canvas of `length` positions from `begin` on to the grammar."""
        end = begin + length
        return Constraint(self._by_end.get(end, self.compiled), self._state, max(self._shape.longest - end, 0))

    def follow(self, draft: Sequence[int]) -> bool:
        """Walks a finished canvas through the grammar once more. Returns whether it matches."""
        self._state = self.compiled.walk(self._state, draft)
        return self._state != FAILED


def matching_of(
    grammar: Grammar,
    tokenizer: Tokenizer,
    vocabulary_size: int,
    pad_id: int | None,
    sampler: ResolvedSampler,
    max_new_tokens: int,
    canvas: Canvas | None,
) -> Matching:
    """Compiles a grammar for an answer of at most so many tokens.

    Raises GrammarError where it cannot be compiled, and where pinned and allowed tokens leave no text that matches;
    ValueError, with both numbers, where its shortest text has more tokens.
    """
    compiled = compile_grammar(grammar, tokenizer, vocabulary_size, sampler.eos_token_ids, pad_id)
    if compiled.shortest > max_new_tokens:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, and the shortest text that the grammar matches has "
            f"{compiled.shortest} tokens"
        )
    content = canvas or Canvas()
    certain = content.certain_length(sampler.eos_token_ids)
    longest = max_new_tokens if certain is None else min(max_new_tokens, certain)
    count = -(-longest // sampler.canvas_length)
    ends = [index * sampler.canvas_length + sampler.length_of(index, longest) for index in range(count)]
    end_ids = sorted({*sampler.eos_token_ids, *([] if compiled.pad_id is None else [compiled.pad_id])})
    shape = AnswerShape(longest, ends, end_ids)
    by_end = grammars_of_canvases(compiled, compiled.start, content, shape)
    if by_end is None:
        raise GrammarError(
            "canvas has pinned and allowed tokens with which no text that the grammar matches ends within "
            f"{longest} tokens"
        )
    return Matching(grammar, compiled, closing(content, longest, ends[-1], end_ids), shape, by_end)
