"""`dgemma generate`: one prompt, one answer."""

from __future__ import annotations

import sys

from dgemma_ext.arguments import text as checked_text
from dgemma_ext.cli.answer import load_model, tokenizer_of, write_answer
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.engine import Prompt


def run(arguments: Arguments) -> None:
    text = _from_stdin() if arguments.prompt == "-" else arguments.prompt
    if not text.strip():
        raise ValueError("PROMPT is empty")
    prompt: Prompt = checked_text("PROMPT", text)
    if arguments.system is not None:
        prompt = [{"role": "system", "content": arguments.system}, {"role": "user", "content": text}]
    asked = {**arguments.prompting, "grammar": arguments.grammar}
    model = load_model(arguments)
    events = model.stream(prompt, arguments.max_new_tokens, arguments.sampler, arguments.seed, **asked)
    write_answer(events, tokenizer_of(model), arguments)


def _from_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not {error.encoding}: {error.reason} at byte {error.start}") from error
