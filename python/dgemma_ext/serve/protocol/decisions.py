"""/v1/decisions: its request and answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from dgemma_ext.serve.protocol.chat import Message
from dgemma_ext.serve.protocol.common import Body, Count, ImageSettings, Object, Seed, Usage

Texts = Annotated[list[str], Field(min_length=1)]
Labels = Annotated[dict[str, str | Texts], Field(min_length=2)]


class DecisionRequest(Body):
    """What to decide, and between what.

    input: a user's message, or several that are decided one by one; or else messages: one chat. choices: texts that are
    one token each, or an object of choices and their labels, which are. template: the text of the answer, with {} where
    the label stands. canvas_length: positions, by default as few as 32. seed: of the noise at the label's position.
    """

    model: str | None = None
    input: str | Texts | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    choices: Annotated[list[str], Field(min_length=2)] | Labels
    template: str = "{}"
    canvas_length: Count | None = None
    seed: Seed = 0
    chat_template_kwargs: Object | None = None
    mm_processor_kwargs: ImageSettings = None

    @classmethod
    def refused(cls) -> dict[str, tuple[Any, ...]]:
        return {**super().refused(), "stream": (False,)}


class OneDecision(BaseModel):
    """probabilities: of each choice, given that the answer is one of them. mass: what the choices hold together of the
    model's whole distribution."""

    index: int
    choice: str
    probabilities: dict[str, float]
    mass: float
    denoising_steps: int


class Decisions(BaseModel):
    id: str
    object: Literal["decisions"]
    created: int
    model: str
    system_fingerprint: str
    data: list[OneDecision]
    usage: Usage
