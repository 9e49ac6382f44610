"""An answer's way through its grammar: the checks of its submission, and what holds each of its canvases to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.errors import GrammarError
from dgemma_ext.sampling import (
    FAILED,
    THINK,
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

    def constraint(self, begin: int, length: int) -> Constraint:
        """What holds the canvas of `length` positions from `begin` on to the grammar."""
        end, budget = begin + length, self._shape.thinking_budget
        compiled, tokens_left = self._by_end.get(end, self.compiled), max(self._shape.longest - end, 0)
        return Constraint(compiled, self._state, tokens_left, None if budget is None else budget - begin)

    def follow(self, draft: Sequence[int]) -> bool:
        """Walks a finished canvas through the grammar once more. Returns whether it matches."""
        self._state = self.compiled.walk(self._state, draft)
        return self._state != FAILED


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
