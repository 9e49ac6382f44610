"""`dgemma decide`: which of some choices answers a prompt."""

from __future__ import annotations

from typing import Any

from dgemma_ext.checkpoint import resolve_checkpoint
from dgemma_ext.cli.answer import load_checkpoint, write_json
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.cli.generate import prompt_of


def run(arguments: Arguments) -> None:
    prompt = prompt_of(arguments)
    choices = _choices(arguments.choice or [])
    model = load_checkpoint(resolve_checkpoint(arguments.model), arguments)
    decision = model.decide(
        prompt,
        choices,
        arguments.template,
        arguments.canvas_length,
        arguments.seed,
        image_tokens=arguments.image_tokens,
        **arguments.prompting,
    )
    if arguments.json:
        facts: dict[str, Any] = {
            "event": "decision",
            "choice": decision.choice,
            "probabilities": decision.probabilities,
            "mass": decision.mass,
            "denoising_steps": decision.steps,
            "seed": arguments.seed,
            "seconds": round(decision.seconds, 4),
        }
        write_json(facts)
        return
    width = max(map(len, decision.probabilities))
    for choice in sorted(decision.probabilities, key=lambda one: -decision.probabilities[one]):
        print(f"{choice:{width}}  {decision.probabilities[choice]:.4f}")
    print(f"{'mass':{width}}  {decision.mass:.4f}")


def _choices(given: list[str]) -> dict[str, str]:
    """Choice → its label, which it names behind a = or is itself. Raises ValueError for one that is given twice."""
    choices: dict[str, str] = {}
    for text in given:
        choice, equals, label = text.partition("=")
        if not (choice and equals and label):
            choice = label = text
        if choice in choices:
            raise ValueError(f"--choice {choice} is given more than once")
        choices[choice] = label
    if len(choices) < 2:
        raise ValueError("--choice is wanted two times or more")
    return choices
