"""From prompts to answers on the scheduler: what `generate` and `stream` of a model do."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, Protocol

from dgemma_ext import arguments
from dgemma_ext.engine.events import Commit, Draft, Failure
from dgemma_ext.engine.group import bucket_of
from dgemma_ext.engine.output import Output
from dgemma_ext.engine.prompt import Prompt, PromptOptions, TokenizedPrompt, tokenize_prompt
from dgemma_ext.engine.request import Request, cached_positions
from dgemma_ext.engine.scheduler import Scheduler
from dgemma_ext.engine.served import ServedModel
from dgemma_ext.sampling import Canvas, SamplerConfig, resolve_sampler

# Further requests wait their turn: a larger batch is no faster on a CPU, and each slot costs memory.
_MAX_BATCH = 32
# A kept cache has at least as many positions as the sliding window of the published model.
_LEAST_POSITIONS = 1024


class GeneratingModel(ServedModel, Protocol):
    """A model that keeps the scheduler of the last call."""

    kept_scheduler: Scheduler | None


class Generation:
    """Prompts on their way to answers. The arguments are those of DiffusionGemma.generate."""

    def __init__(
        self,
        model: GeneratingModel,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None,
        sampler: SamplerConfig | None,
        seed: int | Sequence[int],
        canvas: Canvas | Sequence[Canvas | None] | None,
        tools: Any = None,
        enable_thinking: Any = None,
        chat_template_kwargs: Any = None,
        special_tokens: Any = "text",
        logprobs: Any = None,
        deadline: Any = None,
        grammar: Any = None,
        images: Any = None,
        image_tokens: Any = None,
        adapter: Any = None,
        logprob_token_ids: Any = None,
    ) -> None:
        prompts, self._is_batch = as_batch(prompt)
        count = len(prompts)
        given = (enable_thinking, chat_template_kwargs, special_tokens, image_tokens)
        options = _options_per_prompt(tools, *given, count)
        images_of_prompts = _one_per_prompt("images", images, count) if self._is_batch else [images]
        seeds = _one_per_prompt("seed", seed, len(prompts))
        canvases = _one_per_prompt("canvas", canvas, len(prompts))
        by_prompt = {
            "logprobs": logprobs,
            "deadline": deadline,
            "grammar": grammar,
            "logprob_token_ids": logprob_token_ids,
            "adapter": adapter,
        }
        columns = [_one_per_prompt(name, value, len(prompts)) for name, value in by_prompt.items()]
        asked = [dict(zip(by_prompt, values, strict=True)) for values in zip(*columns, strict=True)]
        for one in canvases:
            if one is not None:
                arguments.instance("canvas", one, Canvas, "a dg.Canvas or None, or a list of them")
        config = model.network.config
        names = [f"prompt[{index}]" if self._is_batch else "prompt" for index in range(len(prompts))]
        tokenized = [
            tokenize_prompt(prompt, model, name, *more)
            for prompt, name, *more in zip(prompts, names, options, images_of_prompts, strict=True)
        ]
        length = resolve_sampler(sampler, model.defaults, config.canvas_length).canvas_length
        limit = model.defaults.max_new_tokens if max_new_tokens is None else max_new_tokens
        limit = arguments.integer("max_new_tokens", limit, least=1)
        longest = cached_positions(max(map(len, tokenized)), limit, length)
        context = config.max_position_embeddings
        self.scheduler = _scheduler_for(model, min(len(prompts), _MAX_BATCH), min(longest, context))
        self.requests: list[Request] = []
        try:
            for one_prompt, one_seed, one_canvas, extra in zip(tokenized, seeds, canvases, asked, strict=True):
                submitted = self.scheduler.submit(one_prompt, max_new_tokens, sampler, one_seed, one_canvas, **extra)
                self.requests.append(submitted)
        except BaseException:
            self._cancel()
            raise

    def outputs(self, on_draft: Callable[[Draft], None] | None = None) -> Output | list[Output]:
        """Runs to the end. Without `on_draft` a GPU runs a canvas's steps by itself."""
        # Closed here, because an exception of `on_draft` would keep it, and with it the requests.
        with closing(self.events(drafts=on_draft is not None)) as events:
            for event in events:
                if on_draft is not None and isinstance(event, Draft):
                    on_draft(event)
        outputs = [request.output for request in self.requests]
        return outputs if self._is_batch else outputs[0]

    def events(self, drafts: bool = True) -> Generator[Draft | Commit]:
        """A Draft at every denoising step, where they are wanted, and a Commit for every finished canvas."""
        advance = self.scheduler.step if drafts else self.scheduler.finish_canvas
        try:
            while not self.scheduler.idle:
                for event in advance():
                    if isinstance(event, Failure):
                        raise event.error
                    yield event
        finally:
            self._cancel()

    def _cancel(self) -> None:
        """Leaves the scheduler free for a later call."""
        for request in self.requests:
            request.cancel()
        self.scheduler.release()


def _scheduler_for(model: GeneratingModel, requests: int, positions: int) -> Scheduler:
    """A scheduler for `requests` of up to `positions` each; on a GPU the last call's, where it is large enough.

    Capturing a step takes as long as running several, so a GPU's graphs are kept from call to call. Sizes are rounded
    up to powers of two, so that calls of similar size share one scheduler.
    """
    if not _keeps_schedulers(model):
        return Scheduler(model, requests, positions)
    kept = model.kept_scheduler
    if kept is not None and not kept.claim(model):
        return Scheduler(model, requests, positions)  # an unfinished stream or another thread uses the kept one
    if (
        kept is None
        or kept.network is not model.network
        or kept.max_batch < requests
        or kept.cache.max_length < positions
    ):
        kept = model.kept_scheduler = None  # frees its memory before the new one is made
        rounded = max(_LEAST_POSITIONS, bucket_of(positions))
        kept = Scheduler(model, bucket_of(requests), min(rounded, model.network.config.max_position_embeddings))
        kept.claim(model)
        model.kept_scheduler = kept
    return kept


def _keeps_schedulers(model: GeneratingModel) -> bool:
    return model.network.device.type == "cuda"


def as_batch(prompt: Any) -> tuple[list[Any], bool]:
    """The prompts as a list, and whether the caller gave a list of prompts."""
    if isinstance(prompt, str | TokenizedPrompt):
        return [prompt], False
    parts = arguments.sequence("prompt", prompt, "a string, a chat, token ids, or a list of these")
    if not parts:
        raise ValueError("prompt is empty")
    # The messages of a chat are mappings, and ids are numbers.
    is_batch = any(isinstance(part, str | TokenizedPrompt) or arguments.is_sequence(part) for part in parts)
    return (parts, True) if is_batch else ([parts], False)


def _options_per_prompt(
    tools: Any, enable_thinking: Any, chat_template_kwargs: Any, special_tokens: Any, image_tokens: Any, count: int
) -> list[PromptOptions]:
    """Each prompt's options. Every argument is one for all prompts or a list of one per prompt; of tools, lists."""
    given = arguments.sequence("tools", tools, "a list") if arguments.is_sequence(tools) else []
    differ = bool(given) and all(one is None or arguments.is_sequence(one) for one in given)
    columns = [
        _one_per_prompt("tools", tools, count) if differ else [tools] * count,
        _one_per_prompt("enable_thinking", enable_thinking, count),
        _one_per_prompt("chat_template_kwargs", chat_template_kwargs, count),
        _one_per_prompt("special_tokens", special_tokens, count),
        _one_per_prompt("image_tokens", image_tokens, count),
    ]
    return [PromptOptions(*values) for values in zip(*columns, strict=True)]


def _one_per_prompt(name: str, value: Any, count: int) -> list[Any]:
    if not arguments.is_sequence(value):
        return [value] * count
    values = arguments.sequence(name, value, "one value or one per prompt")
    if len(values) != count:
        raise ValueError(f"{name} must be one value or {count}, one per prompt, got {len(values)}")
    return values
