"""`dgemma generate`: one prompt, one answer."""

from __future__ import annotations

import sys

from dgemma_ext.cli.answer import load_model, tokenizer_of, write_answer
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.engine import Prompt


def run(arguments: Arguments) -> None:
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not text.strip():
        raise ValueError("PROMPT is empty")
    prompt: Prompt = text
    if arguments.system is not None:
        prompt = [{"role": "system", "content": arguments.system}, {"role": "user", "content": text}]
    model = load_model(arguments)
    events = model.stream(prompt, arguments.max_new_tokens, arguments.sampler, arguments.seed)
    write_answer(events, tokenizer_of(model), arguments)
