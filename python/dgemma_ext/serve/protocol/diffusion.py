"""The object `diffusion` of a request: what only a diffusion model can be asked, by the engine's names."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
# Of a canvas, so that no request holds a slot for good; checkpoints have 48.
MOST_STEPS = 1024


class TextPart(BaseModel):
    """Text on the canvas; pinned text is held in every step and stands in the answer."""

    model_config = ConfigDict(extra="forbid")

    text: str
    pinned: Flag = False


class BlankPart(BaseModel):
    """So many tokens that the model fills in."""

    model_config = ConfigDict(extra="forbid")

    blank: Annotated[int, Field(ge=1, le=2**20, strict=True)]


Span = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=2, max_length=2)]


class DiffusionOptions(BaseModel):
    """Settings of the sampler, each with the checkpoint's value as its default, and the canvas to begin with.

    drafts: send the draft of every denoising step (streams only). start_text: text, or parts of text and blanks, that
    the canvas begins with in place of noise. pinned: spans [begin, end) of characters of a start_text that is one
    string; their text is held. start_step: the step to begin with; a later one keeps an edit close to its text.
    deadline_ms: when so much time is up, in the queue or in steps, the answer ends with the newest draft.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    drafts: Flag = False
    deadline_ms: Annotated[int, Field(ge=1, lt=2**31, strict=True)] | None = None
    max_denoising_steps: Annotated[int, Field(ge=1, le=MOST_STEPS, strict=True)] | None = None
    entropy_bound: Annotated[float, Field(ge=0, strict=True)] | None = None
    t_min: Annotated[float, Field(ge=0, strict=True)] | None = None
    t_max: Annotated[float, Field(gt=0, strict=True)] | None = None
    stability_threshold: Annotated[int, Field(ge=0, lt=2**31, strict=True)] | None = None
    confidence_threshold: Annotated[float, Field(ge=0, strict=True)] | None = None
    canvas_length: Count | None = None
    trim_canvas: Flag | None = None
    start_text: str | Annotated[list[TextPart | BlankPart], Field(min_length=1)] | None = None
    pinned: list[Span] | None = None
    start_step: Annotated[int, Field(ge=1, le=MOST_STEPS, strict=True)] | None = None
