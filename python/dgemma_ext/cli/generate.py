"""`dgemma generate`: one prompt, one answer."""

from __future__ import annotations

import sys

from dgemma_ext.arguments import text as checked_text
from dgemma_ext.cli import images
from dgemma_ext.cli.answer import load_model, tokenizer_of, write_answer
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.engine import Prompt


def run(arguments: Arguments) -> None:
    prompt = prompt_of(arguments)
    asked = {**arguments.prompting, "grammar": arguments.grammar, "image_tokens": arguments.image_tokens}
    model = load_model(arguments)
    events = model.stream(prompt, arguments.max_new_tokens, arguments.sampler, arguments.seed, **asked)
    write_answer(events, tokenizer_of(model), arguments)


def prompt_of(arguments: Arguments) -> Prompt:
    """The prompt of a command line, from stdin where it is -, with its system message and images. Raises ValueError for
    none, and for an image that cannot be read."""
    text = _from_stdin() if arguments.prompt == "-" else arguments.prompt
    if not text.strip():
        raise ValueError("PROMPT is empty")
    prompt = checked_text("PROMPT", text)
    images.check(arguments)
    if arguments.system is None and not arguments.image:
        return prompt
    before = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return [*before, {"role": "user", "content": images.content(text, arguments.image)}]


def _from_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not {error.encoding}: {error.reason} at byte {error.start}") from error
