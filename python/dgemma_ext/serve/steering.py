"""From a request's fields to the engine's sampler, seeds and canvas."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from dgemma_ext.checkpoint import GenerationDefaults, Tokenizer
from dgemma_ext.sampling import Canvas, SamplerConfig
from dgemma_ext.serve import errors
from dgemma_ext.serve.protocol.diffusion import BlankPart, DiffusionOptions, TextPart

# Temperature 0: logits that differ at all differ by far more than this times any number that a draw could reach.
_LEAST_TEMPERATURE = 1e-6
_SEEDS = 2**63
# A seed that was drawn here is one that JSON's readers in other languages keep exactly.
_DRAWN_SEEDS = 2**53
_SAME_NAMES = (
    "max_denoising_steps",
    "entropy_bound",
    "stability_threshold",
    "confidence_threshold",
    "canvas_length",
)


def sampler_of(
    temperature: float | None, options: DiffusionOptions, defaults: GenerationDefaults, trim_canvas: bool
) -> SamplerConfig:
    """The sampler of a request.

    temperature: multiplies the schedule, t_min and t_max, whether the checkpoint's or the request's; 1 and None leave
    it as it is. 0 makes every draw the most likely token. trim_canvas: the server's default.
    """
    given: dict[str, Any] = {name: getattr(options, name) for name in _SAME_NAMES}
    given["trim_canvas"] = trim_canvas if options.trim_canvas is None else options.trim_canvas
    t_min, t_max = options.t_min, options.t_max
    if temperature is not None and temperature != 1:
        t_min, t_max = (
            max(_LEAST_TEMPERATURE, temperature * (default if value is None else value))
            for value, default in ((t_min, defaults.t_min), (t_max, defaults.t_max))
        )
    return SamplerConfig(t_min=t_min, t_max=t_max, **given)


def seeds_of(seed: int | None, temperature: float | None, count: int) -> list[int]:
    """The seeds of a request's `count` answers: its own and the numbers after it.

    Without one it is drawn, or 0 at temperature 0, which is asked for to get the same answer again.
    """
    if seed is None:
        seed = 0 if temperature == 0 else secrets.randbelow(_DRAWN_SEEDS)
    return [(seed + index) % _SEEDS for index in range(count)]


def canvas_of(options: DiffusionOptions, tokenizer: Tokenizer, longest: int) -> Canvas | None:
    """The canvas that a request begins with; raises ApiError for one that cannot be made. It tokenizes text.

    longest: the most tokens that it may have, those of the model's context.
    """
    if options.start_text is None:
        for name in ("pinned", "start_step"):
            if getattr(options, name) is not None:
                raise errors.bad_request(f"{name} is for a start_text, and there is none", f"diffusion.{name}")
        return None
    tokens: list[int | None] = []
    pinned: list[bool] = []
    for part in _parts(options.start_text, options.pinned):
        if isinstance(part, BlankPart) and part.blank > longest:
            raise _too_long(longest)
        ids = [None] * part.blank if isinstance(part, BlankPart) else tokenizer.encode(part.text)
        if len(tokens) + len(ids) > longest:
            raise _too_long(longest)
        tokens += ids
        pinned += [isinstance(part, TextPart) and part.pinned] * len(ids)
    return Canvas(tokens=tokens, pinned=pinned, start_step=options.start_step or 1)


def _too_long(longest: int) -> errors.ApiError:
    return errors.bad_request(
        f"start_text has more than the {longest} tokens of the model's context", "diffusion.start_text"
    )


def _parts(
    start_text: str | list[TextPart | BlankPart], pinned: Sequence[Sequence[int]] | None
) -> list[TextPart | BlankPart]:
    if not isinstance(start_text, str):
        if pinned is not None:
            raise errors.bad_request(
                "pinned is for a start_text that is one string; its parts have a field of their own", "diffusion.pinned"
            )
        return start_text
    return list(_cut(start_text, pinned or []))


def _cut(text: str, spans: Sequence[Sequence[int]]) -> Iterator[TextPart]:
    """The text, cut where what is pinned begins and ends, so that no token is half pinned."""
    at = 0
    for begin, end in sorted(map(tuple, spans)):
        if not at <= begin < end <= len(text):
            raise errors.bad_request(
                f"pinned must be spans [begin, end) of start_text's {len(text)} characters that do not overlap, got "
                f"[{begin}, {end}]",
                "diffusion.pinned",
            )
        if at < begin:
            yield TextPart(text=text[at:begin])
        yield TextPart(text=text[begin:end], pinned=True)
        at = end
    if at < len(text):
        yield TextPart(text=text[at:])
