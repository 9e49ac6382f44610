"""Decisions: which of some choices stands at one place of a canvas whose rest is pinned, read in one denoising step.

The canvas is short, its text but for the label is pinned, and the label's position begins as noise. One step gives the
model's distribution there; what the tokens of a choice's labels hold of it, is the choice's probability. Nothing is
drawn from it, and nothing is encoded after it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dgemma_ext import arguments
from dgemma_ext.checkpoint import GenerationDefaults, Tokenizer
from dgemma_ext.engine.generation import GeneratingModel, Generation, as_batch
from dgemma_ext.engine.prompt import Prompt
from dgemma_ext.sampling import Canvas, SamplerConfig, TokenLogprobs, tokenizer_vocabulary

# What a template has where the label stands.
_PLACE = "{}"
# The shortest canvas; longer ones are a power of two. A narrower one saves no time worth having.
_LEAST_LENGTH = 32
# Gemma's end of a turn, which ends an answer where the checkpoint has it among its end-of-sequence tokens.
_END_OF_TURN = "<turn|>"

# The texts of the choices, or a mapping from choices to their labels.
Choices = Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Decision:
    """What the model says of some choices.

    choice: the most probable, of equal ones the first. probabilities: of each choice, given that the answer is one of
    them; they sum to 1. mass: the share of the model's whole distribution that the choices hold, in [0, 1]. Where it is
    small the model wants to say something else. steps: denoising steps. seconds: from the call to its end, for all its
    prompts.
    """

    choice: str
    probabilities: Mapping[str, float]
    mass: float
    steps: int
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class DecisionCanvas:
    """A canvas with one open position; `decision_canvas` makes one. length: of the canvas, of at least its tokens."""

    canvas: Canvas
    position: int
    length: int

    @property
    def sampler(self) -> SamplerConfig:
        """One step. The temperature is that of the draw alone, which nobody reads."""
        return SamplerConfig(max_denoising_steps=1, t_min=1.0, t_max=1.0, canvas_length=self.length)

    def read(
        self,
        logprobs: Sequence[TokenLogprobs],
        ids_of: Mapping[str, Sequence[int]],
        steps: int,
        seconds: float = 0.0,
    ) -> Decision:
        """The decision from the answer's log-probabilities; those of the label's position have all ids of `ids_of`."""
        one = logprobs[self.position]
        of_id = dict(zip(one.top_ids, one.top_logprobs, strict=True))
        highest = max(of_id.values())  # taken off before exp, which would be 0 for improbable labels
        weight_of = {token: math.exp(value - highest) for token, value in of_id.items()}
        weights = {choice: math.fsum(weight_of[token] for token in ids) for choice, ids in ids_of.items()}
        total = math.fsum(weights.values())
        probabilities = {choice: weight / total for choice, weight in weights.items()}
        # max() keeps the first of equal ones.
        best = max(probabilities, key=lambda choice: probabilities[choice])
        return Decision(best, probabilities, min(1.0, math.exp(highest) * total), steps, seconds)


def decide(
    model: GeneratingModel,
    prompt: Prompt | Sequence[Prompt],
    choices: Choices | Sequence[Choices],
    template: str,
    canvas_length: int | None,
    seed: int | Sequence[int],
    **options: Any,
) -> Decision | list[Decision]:
    """The decisions of one call. The arguments are those of DiffusionGemma.decide."""
    began = time.perf_counter()
    prompts, is_batch = as_batch(prompt)
    config, tokenizer = model.network.config, model.tokenizer
    if tokenizer is None:
        raise ValueError("a decision needs a checkpoint with tokenizer.json")
    spelled = [
        label_ids(one, tokenizer, config.vocab_size, name)
        for name, one in _choices_per_prompt(choices, len(prompts) if is_batch else None)
    ]
    held = decision_canvas(template, tokenizer, model.defaults, config.canvas_length, canvas_length)
    read = [ids_read(ids_of) for ids_of in spelled]
    generation = Generation(
        model, prompt, held.length, held.sampler, seed, held.canvas, logprob_token_ids=read, **options
    )
    generation.outputs()
    seconds = time.perf_counter() - began
    decisions = [
        held.read(request.logprobs or (), ids_of, sum(request.denoising_steps), seconds)
        for request, ids_of in zip(generation.requests, spelled, strict=True)
    ]
    return decisions if is_batch else decisions[0]


def decision_canvas(
    template: str,
    tokenizer: Tokenizer,
    defaults: GenerationDefaults,
    longest: int,
    canvas_length: int | None = None,
) -> DecisionCanvas:
    """The canvas of a decision: the template's text, the end of the turn and padding, all pinned but for the label.

    template: text with {} where the label stands. A space before it belongs to the label, whose token brings it.
    longest: the checkpoint's canvas. canvas_length: default the least of 32, 64, 128, ... that has room.
    Raises ValueError naming the argument.
    """
    parts = arguments.text("template", template).split(_PLACE)
    if len(parts) != 2:
        raise arguments.refusal("template", f"text with {_PLACE} once, where the label stands", template)
    before, after = tokenizer.encode(parts[0].removesuffix(" ")), tokenizer.encode(parts[1])
    needed = len(before) + 1 + len(after) + 1
    if canvas_length is None:
        length = min(max(_LEAST_LENGTH, 1 << (needed - 1).bit_length()), longest)
    else:
        length = arguments.integer("canvas_length", canvas_length, least=1, end=longest + 1)
    if needed > length:
        raise ValueError(f"template has {needed} tokens with the label and the end, and the canvas {length} positions")
    tokens: list[int | None] = [*before, None, *after]
    end = end_of_turn(tokenizer, defaults)
    if end is not None:
        tokens.append(end)
        pad = end if defaults.pad_token_id is None else defaults.pad_token_id
        tokens += [pad] * (length - len(tokens))
    canvas = Canvas(tokens=tokens, pinned=[token is not None for token in tokens])
    return DecisionCanvas(canvas, len(before), length)


def end_of_turn(tokenizer: Tokenizer, defaults: GenerationDefaults) -> int | None:
    """The token that ends a turn; None for a checkpoint without an end of sequence."""
    try:
        end = tokenizer.id_of(_END_OF_TURN)
    except ValueError:
        end = None
    return end if end in defaults.eos_token_ids else next(iter(defaults.eos_token_ids), None)


def label_ids(choices: Choices, tokenizer: Tokenizer, vocab_size: int, name: str = "choices") -> dict[str, list[int]]:
    """Choice → the ids of all tokens that write one of its labels, with or without a space before it.

    Raises ValueError naming the choice whose label is no token, and two choices that share one.
    """
    labels_of = _labels(choices, name)
    found: dict[str, list[int]] = {}
    choice_of: dict[int, str] = {}
    for choice, labels in labels_of.items():
        found[choice] = []
        for label in labels:
            ids = _ids_of_text(label.strip(" "), tokenizer, vocab_size)
            if not ids:
                raise ValueError(
                    f"{name} has the label {label!r}, which is {len(tokenizer.encode(label))} tokens, and a decision "
                    "reads one; give each choice a label of one token and tell the model in the prompt what it stands "
                    f"for, as in {{{choice!r}: 'A', ...}}"
                )
            for token in ids:
                if choice_of.setdefault(token, choice) != choice:
                    raise ValueError(f"{name} has {choice_of[token]!r} and {choice!r}, which share the label {label!r}")
            found[choice] += [token for token in ids if token not in found[choice]]
    return found


def _labels(choices: Any, name: str) -> dict[str, list[str]]:
    """Choice → its labels."""
    wanted = "two texts or more, or a mapping from choices to their labels"
    if isinstance(choices, Mapping):
        labels_of = {
            arguments.text(f"a choice of {name}", choice): _texts(f"{name}[{choice!r}]", labels)
            for choice, labels in choices.items()
        }
    else:
        texts = _texts(name, choices, wanted) if arguments.is_sequence(choices) else []
        labels_of = {text: [text] for text in texts}
        if len(labels_of) < len(texts):
            repeated = next(text for text in texts if texts.count(text) > 1)
            raise ValueError(f"{name} has {repeated!r} more than once")
    if len(labels_of) < 2:
        raise arguments.refusal(name, wanted, choices)
    return labels_of


def _texts(name: str, value: Any, wanted: str = "a text or a list of texts") -> list[str]:
    given = [value] if isinstance(value, str) else arguments.sequence(name, value, wanted)
    texts = [arguments.text(f"{name}[{index}]", one) for index, one in enumerate(given)]
    if not texts or not all(text.strip(" ") for text in texts):
        raise arguments.refusal(name, f"{wanted} that are not empty", value)
    return texts


def _ids_of_text(text: str, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The ids of tokens that write a text with or without a space before it, from the sorted strings of all."""
    vocabulary = tokenizer_vocabulary(tokenizer, vocab_size)
    return [token for spelled in (text, f" {text}") for token in vocabulary.ids_of(spelled.encode())]


def ids_read(ids_of: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """All ids whose log-probabilities a decision reads."""
    return tuple(token for ids in ids_of.values() for token in ids)


def _choices_per_prompt(choices: Any, count: int | None) -> list[tuple[str, Any]]:
    """Each prompt's choices with the name that errors call them. count: of the prompts; None for one by itself."""
    by_prompt = arguments.is_sequence(choices) and any(
        isinstance(one, Mapping) or (arguments.is_sequence(one) and not isinstance(one, str)) for one in choices
    )
    if not by_prompt:
        return [("choices", choices)] * (1 if count is None else count)
    if count is None or len(choices) != count:
        wanted = "one list" if count is None else f"one list or {count}, one per prompt"
        raise ValueError(f"choices must be {wanted}, got {len(choices)}")
    return [(f"choices[{index}]", one) for index, one in enumerate(choices)]
