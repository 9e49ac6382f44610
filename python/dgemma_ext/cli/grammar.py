"""`dgemma grammar`: what a grammar becomes over a checkpoint's tokens, and texts that match it."""

from __future__ import annotations

import random

from dgemma_ext.checkpoint import GenerationDefaults, ModelConfig, Tokenizer, resolve_checkpoint
from dgemma_ext.cli.answer import write_json
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.cli.watch import visible
from dgemma_ext.sampling import Grammar, Walks, compile_grammar

_WALKS = 10
# What models may write before an answer without being told to think.
_EMPTY_THOUGHT = "<|channel>thought\n<channel|>"


def run(arguments: Arguments) -> None:
    grammar = _given(arguments)
    path = resolve_checkpoint(arguments.model)  # of which no weight is read
    config = ModelConfig.from_file(path)
    defaults, tokenizer = GenerationDefaults.from_file(path, config), Tokenizer.from_directory(path)
    compiled = compile_grammar(
        grammar, tokenizer, config.vocab_size, defaults.eos_token_ids, defaults.pad_token_id, arguments.thinking
    )
    walks, rng = Walks(compiled), random.Random(arguments.seed)
    texts = [
        tokenizer.decode(tokens, skip_special_tokens=False)
        for tokens in [walks.shortest(), *(walks.draw(rng) for _ in range(_WALKS))]
    ]
    if not arguments.thinking:
        texts = [text.removeprefix(_EMPTY_THOUGHT) for text in texts]
    shortest, *texts = texts
    sizes = {
        "states": compiled.states,
        "classes": compiled.num_classes,
        "arcs": compiled.arcs,
        "bytes": compiled.nbytes,
        "shortest_tokens": compiled.shortest,
    }
    if arguments.json:
        write_json({**sizes, "shortest": shortest, "walks": texts})
        return
    print(f"{compiled.states} states, {compiled.num_classes} classes of tokens, {compiled.arcs} arcs", end="")
    print(f", {compiled.nbytes} bytes; the shortest text has {compiled.shortest} tokens:")
    for text in (shortest, "", *texts):
        print(visible(text).replace("\n", "\\n"))


def _given(arguments: Arguments) -> Grammar:
    given = [
        value
        for value in (arguments.json_schema, arguments.regex, arguments.choice, arguments.tools)
        if value is not None
    ]
    if len(given) != 1:
        raise ValueError("one of FILE.json, --regex, --choice and --tools is wanted")
    if arguments.tools is not None and arguments.tool_choice is None:
        arguments.tool_choice = "required"
    arguments.thinking_budget = None  # it is no part of what is compiled
    grammar = arguments.grammar
    assert grammar is not None  # one is given
    return grammar
