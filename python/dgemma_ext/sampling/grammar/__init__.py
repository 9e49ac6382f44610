"""Grammars: what an answer must match, compiled to automata over tokens.

`grammars` has what a caller says; `schema`, `json_text`, `formats`, `tool_text`, `thinking`, `regex` and `pattern` make
patterns of it; `vocabulary` and `compiled` make the automaton over a tokenizer's tokens; `walks` draws texts from it.
"""

from __future__ import annotations

from dgemma_ext.sampling.grammar.compiled import FAILED, CompiledGrammar, compile_pattern
from dgemma_ext.sampling.grammar.grammars import Choice, Grammar, JsonSchema, Regex, ToolCalls, compile_grammar
from dgemma_ext.sampling.grammar.thinking import CLOSE, OPEN, THINK
from dgemma_ext.sampling.grammar.vocabulary import Vocabulary, tokenizer_vocabulary, vocabulary_of
from dgemma_ext.sampling.grammar.walks import Walks
