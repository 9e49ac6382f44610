"""A compiled grammar: an automaton over tokens, as the operators read it and as the host walks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

import dgemma_ext._C as _C
from dgemma_ext.errors import GrammarError
from dgemma_ext.ops.automaton import tokens_by_class
from dgemma_ext.sampling.grammar.pattern import Pattern
from dgemma_ext.sampling.grammar.vocabulary import Vocabulary

MOST_STATES = 16_384
MOST_CLASSES = 4_096
MOST_ARCS = 131_072
_LOWER = "maxLength, maxItems, the counts of a pattern, or max_depth"
# Of no state that an automaton has.
FAILED = -1


@dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """The automaton of a grammar over a tokenizer's tokens; `compile_pattern` makes one.

    Tokens that lead from every state to the same state are a class; class 0 leads nowhere. Classes that lead from one
    state to another are a set, and an arc has one. END, the last state, follows an accepting state by an
    end-of-sequence token, and itself by the padding token (by any, where the model has none).

    classes: int32 [vocabulary], the class of each id. out_*: arcs by source, in_*: the same arcs by target, as CSR:
    begin [states + 1], the other state and the set of each arc. set_begin, set_class: the classes of each set.
    distance: int32 [states], the fewest tokens after which the text may end. closing: int32 [states], the fewest after
    which a thought that is open in a state, or must still come, is closed, else 0; None where none ever is.
    """

    states: int
    start: int
    num_classes: int
    classes: np.ndarray
    set_begin: np.ndarray
    set_class: np.ndarray
    out_begin: np.ndarray
    out_target: np.ndarray
    out_set: np.ndarray
    in_begin: np.ndarray
    in_source: np.ndarray
    in_set: np.ndarray
    distance: np.ndarray
    closing: np.ndarray | None = None
    pad_id: int | None = None  # the padding token that END goes on with; None: it goes on with any

    @property
    def arcs(self) -> int:
        return len(self.out_target)

    @property
    def tables(self) -> tuple[np.ndarray, ...]:
        """The arrays in the order of the operators (ops.automaton)."""
        return (
            *(self.classes, self.set_begin, self.set_class, self.out_begin, self.out_target, self.out_set),
            *(self.in_begin, self.in_source, self.in_set, self.distance),
            *self._tokens_by_class,
        )

    @cached_property
    def _tokens_by_class(self) -> tuple[np.ndarray, np.ndarray]:
        return tokens_by_class(self.classes, self.num_classes)

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text, without an end-of-sequence token."""
        return int(self.distance[self.start])

    @property
    def end(self) -> int:
        return self.states - 1

    def after(self, state: int, token: int) -> int:
        """The state after a token; FAILED where the grammar does not go on with it."""
        if state == FAILED or not 0 <= token < len(self.classes):
            return FAILED
        wanted = self.classes[token]
        for arc in range(self.out_begin[state], self.out_begin[state + 1]):
            of = self.out_set[arc]
            if wanted in self.set_class[self.set_begin[of] : self.set_begin[of + 1]]:
                return int(self.out_target[arc])
        return FAILED

    def walk(self, state: int, tokens: Sequence[int]) -> int:
        for token in tokens:
            state = self.after(state, token)
        return state


def compile_pattern(
    pattern: Pattern, vocabulary: Vocabulary, end_ids: Sequence[int], pad_id: int | None
) -> CompiledGrammar:
    """Raises GrammarError for a language without a text, and naming the limit that is exceeded and what to lower."""
    try:
        by_bytes = _C.byte_automaton(np.array(pattern, dtype=np.int32).tobytes())
    except RuntimeError as error:
        raise GrammarError(f"{error}; lower {_LOWER}") from error
    del by_bytes["byte_classes"]  # the length of the table tells it
    try:
        made = _C.token_automaton(
            **by_bytes,
            strings=vocabulary.strings,
            offset=vocabulary.offset.tobytes(),
            most_states=MOST_STATES,
            most_classes=MOST_CLASSES,
            most_arcs=MOST_ARCS,
        )
    except RuntimeError as error:
        raise GrammarError(f"the grammar has more {error} allow: it is too large; lower {_LOWER}") from error
    if made["states"] == 0:
        raise GrammarError("no text matches it that the tokenizer's tokens can spell")
    return _with_ends(made, vocabulary, end_ids, pad_id)


def _with_ends(
    made: dict[str, Any], vocabulary: Vocabulary, end_ids: Sequence[int], pad_id: int | None
) -> CompiledGrammar:
    arrays: dict[str, Any] = {
        name: np.frombuffer(value, np.int32) for name, value in made.items() if isinstance(value, bytes)
    }
    class_of_string = np.append(arrays.pop("class_of_string"), 0).astype(np.int32)  # entry -1: of ids without a string
    classes = class_of_string[vocabulary.string_of_id]
    size = len(classes)
    classes[[token for token in end_ids if token < size]] = made["end_class"]
    if pad_id is not None and pad_id < size and pad_id not in end_ids:
        classes[pad_id] = made["tail_class"]
        return CompiledGrammar(made["states"], made["start"], made["classes"], classes, **arrays, pad_id=pad_id)
    # Without a padding token END goes on with any: a set of all classes takes the place of the last arc's.
    of = int(arrays["out_set"][-1])
    arrays["set_class"] = np.append(arrays["set_class"], np.arange(made["classes"], dtype=np.int32))
    arrays["set_begin"] = np.append(arrays["set_begin"], np.int32(len(arrays["set_class"])))
    every = len(arrays["set_begin"]) - 2
    for name in ("out_set", "in_set"):
        arrays[name] = np.where(arrays[name] == of, np.int32(every), arrays[name])
    return CompiledGrammar(made["states"], made["start"], made["classes"], classes, **arrays)


def with_end_after(grammar: CompiledGrammar, last: int, end: int) -> CompiledGrammar:
    """The grammar in which a text that ends by the token `last` is followed by the token `end`, and no other text is.

    Both are special tokens; `end` is one of the end-of-sequence tokens.
    """
    own_class, of = grammar.num_classes, len(grammar.set_begin) - 1
    classes = grammar.classes.copy()
    classes[end] = own_class
    set_class = np.append(grammar.set_class, np.int32(own_class))
    set_begin = np.append(grammar.set_begin, np.int32(len(set_class)))
    of_last = np.isin(grammar.set_class, grammar.classes[last])
    has_last = np.logical_or.reduceat(of_last, grammar.set_begin[:-1])
    after_last = np.zeros(grammar.states, dtype=bool)
    after_last[grammar.out_target[has_last[grammar.out_set]]] = True

    def sets(source: np.ndarray, target: np.ndarray, given: np.ndarray) -> np.ndarray:
        return np.where((target == grammar.end) & after_last[source], np.int32(of), given)

    states = np.arange(grammar.states)
    by_source = (np.repeat(states, np.diff(grammar.out_begin)), grammar.out_target, grammar.out_set)
    by_target = (grammar.in_source, np.repeat(states, np.diff(grammar.in_begin)), grammar.in_set)
    return replace(
        grammar,
        num_classes=own_class + 1,
        classes=classes,
        set_class=set_class,
        set_begin=set_begin,
        out_set=sets(*by_source),
        in_set=sets(*by_target),
    )
