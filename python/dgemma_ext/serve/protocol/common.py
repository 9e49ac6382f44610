"""Fields that requests of several interfaces have."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from dgemma_ext.serve import errors
from dgemma_ext.serve.protocol.diffusion import Count, DiffusionOptions, Flag

__all__ = ["Body", "Count", "Flag", "GeneratingBody"]

# A field for which only some values are taken; the schema tells which.
_REFUSED = "changes the answer in a way that this model cannot honour"


class Body(BaseModel):
    """Of a request. Unknown fields are ignored, as OpenAI's own servers do; those of `refused` are not.

    refused: a field → the values with which it changes nothing. With others it is refused by name.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @classmethod
    def refused(cls) -> dict[str, tuple[Any, ...]]:
        return {
            "top_p": (1,),
            "top_k": (0, -1),
            "min_p": (0,),
            "presence_penalty": (0,),
            "frequency_penalty": (0,),
            "repetition_penalty": (1,),
            "logit_bias": ({},),
            "min_tokens": (0,),
            "ignore_eos": (False,),
            "stop_token_ids": ([],),
            "bad_words": ([],),
            "guided_json": (),
            "guided_regex": (),
            "guided_choice": (),
            "guided_grammar": (),
        }

    @model_validator(mode="after")
    def _refuse(self) -> Body:
        given = self.model_extra or {}
        for name, neutral in self.refused().items():
            value = given.get(name, getattr(self, name, None))
            if value is not None and not any(_same(value, one) for one in neutral):
                allowed = " or ".join(repr(one) for one in neutral)
                hint = f"; it may only be {allowed}" if neutral else ""
                raise errors.not_supported(name, f"{name} {_REFUSED}{hint}")
        return self


def _same(value: Any, neutral: Any) -> bool:
    """Whether values are equal; True and 1 are not."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


# Strict numbers and flags: JSON's true is no 1, and "5" no 5.
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
Temperature = Annotated[float, Field(ge=0, le=2, strict=True)]
Stops = Annotated[str | list[str] | None, Field(description="Up to 16 strings that end the answer.")]
Choices = Annotated[int, Field(ge=1, le=128, strict=True)]
# JSON objects that the checkpoint's own code checks.
Object = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "additionalProperties": True})]
ImageSettings = Annotated[
    Object | None,
    Field(description="vLLM's: max_soft_tokens, the most that an image becomes: 70, 140, 280, 560 or 1120."),
]
# Checked where they become grammars, and errors name what is wrong. This is for readers of the schema.
_SCHEMA = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
}
Format = Annotated[Any, WithJsonSchema({"anyOf": [_SCHEMA, {"type": "null"}]})]
_NAMED = {"type": "object", "required": ["type"], "properties": {"type": {"const": "function"}}}
_CHOICE = {"anyOf": [{"enum": ["auto", "none", "required"]}, _NAMED, {"type": "null"}]}
ToolChoice = Annotated[Any, WithJsonSchema(_CHOICE)]
Structure = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "minProperties": 1, "maxProperties": 1})]


def stops_of(stop: str | list[str] | None) -> list[str]:
    """The stop strings of a request. Raises ApiError for too many."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > 16:
        raise errors.bad_request(f"stop may have 16 strings at most, got {len(stops)}", "stop")
    return stops


class StreamOptions(BaseModel):
    include_usage: Flag = False


class GeneratingBody(Body):
    """What every request that generates may say."""

    model: str | None = None
    temperature: Temperature | None = None
    seed: Seed | None = None
    stream: Flag = False
    structured_outputs: Annotated[
        Structure | None,
        Field(description="vLLM's: what the answer must match, one of json, json_object, regex, choice."),
    ] = None
    thinking_token_budget: Annotated[
        Count | None, Field(description="vLLM's: a thought before the answer ends within so many tokens.")
    ] = None
    diffusion: DiffusionOptions | None = None
    diffusing: Annotated[Flag, Field(description="Mercury's: a stream's pieces hold the whole text so far.")] = False

    @property
    def choices(self) -> int:
        """How many answers a prompt gets."""
        return 1

    @property
    def alternatives(self) -> int | None:
        """How many tokens of a position get a log-probability beside the one that was taken; None for none at all."""
        return None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every status from 400 on comes with."""

    error: ErrorDetail


class PromptDetails(BaseModel):
    cached_tokens: int


class CompletionDetails(BaseModel):
    """reasoning_tokens: of thoughts, with the tokens that open and close them."""

    reasoning_tokens: int


class DiffusionUsage(BaseModel):
    """What the answers of a request took: steps and canvases of all, seeds one by one."""

    denoising_steps: int
    canvases: int
    tokens_per_forward: float
    seeds: list[int]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    diffusion: DiffusionUsage


class ChoiceDiffusion(BaseModel):
    """How an answer came about. finish_reason is the engine's: eos, length, stop (a stop string) or deadline."""

    seed: int
    denoising_steps: list[int]
    finish_reason: str
