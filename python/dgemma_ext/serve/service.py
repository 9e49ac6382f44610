"""What the routes share: the model, its engine, the names that it goes by, and how a call of it begins."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine import Prompt, PromptOptions, TokenizedPrompt, tokenize_prompt
from dgemma_ext.errors import CheckpointError
from dgemma_ext.model import BASE, DEFAULT
from dgemma_ext.serve import errors
from dgemma_ext.serve.call import Call
from dgemma_ext.serve.engine_thread import EngineThread
from dgemma_ext.serve.images import image_tokens_of, with_images_read
from dgemma_ext.serve.job_runner import Submission
from dgemma_ext.serve.metrics import Metrics
from dgemma_ext.serve.options import ServeOptions
from dgemma_ext.version import __version__

Value = TypeVar("Value")

# Texts that are tokenized, images that are read and grammars that are compiled at once. A text of 8 MB takes 1 GB while
# it is tokenized, an image of 33 million pixels 0.4 GB while it is read.
_THREADS = 8


class Service:
    """A model that is served.

    is_draining: whether new calls are refused because the server ends. fingerprint: of the package and the model's
    shape and adapters, for clients that watch what answers depend on.
    """

    def __init__(self, model: DiffusionGemma, options: ServeOptions) -> None:
        if model.tokenizer is None:
            raise ValueError("a server needs a checkpoint with tokenizer.json")
        self.model = model
        self.tokenizer: Tokenizer = model.tokenizer
        self.options = options
        self.engine = EngineThread(model, options)
        self.metrics = Metrics(self.engine)
        self._threads = anyio.CapacityLimiter(_THREADS)
        self.created = int(time.time())
        self.is_started = False
        self.is_draining = False
        self.open_requests = 0  # of HTTP, that are being answered
        adapters = [(name, adapter.digest) for name, adapter in model.adapters.items()]
        described = f"{model.config} {model.dtype} {model.device.type} {adapters or ''}"
        self.fingerprint = f"dgemma_ext-{__version__}-{hashlib.sha256(described.encode()).hexdigest()[:10]}"

    @property
    def name(self) -> str:
        return self.options.served_model_names[0]

    @property
    def is_ready(self) -> bool:
        return self.is_started and self.engine.is_alive and not self.is_draining

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its answer but for the last canvas."""
        return min(self.engine.scheduler.cache.max_length, self.model.config.max_position_embeddings)

    @property
    def adapters_by_model(self) -> dict[str, str | None]:
        """What clients may call the model → the adapter that it then has: a name of its own for the default one, where
        there is one, and NAME:ADAPTER for each that is loaded, and for the base where a name does not mean that."""
        loaded, default = self.model.adapters, self.model.network.adapters.default
        named = [name for name in loaded if name != DEFAULT] + ([] if default is None else [BASE])
        own = self.options.served_model_names
        return dict.fromkeys(own) | {f"{name}:{adapter}": adapter for name in own for adapter in named}

    def check_model(self, name: str | None) -> str:
        """The model's name for an answer. Raises ApiError for another model's."""
        if name is None:
            return self.name
        if name not in self.adapters_by_model:
            raise errors.unknown_model(name)
        return name

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter of a request for a model that `check_model` has let pass."""
        return None if name is None else self.adapters_by_model[name]

    async def tokenized(self, prompt: Prompt, field: str, options: PromptOptions | None = None) -> TokenizedPrompt:
        """A prompt as the engine takes it, made in another thread, so that a long one keeps nobody waiting.

        Raises ApiError naming `field` where the prompt cannot be encoded.
        """
        made = partial(tokenize_prompt, options=options, local_files=False)
        return await self.in_thread(field, made, prompt, self.model)

    async def with_images_read(
        self, turns: Sequence[Mapping[str, Any]], field: str, settings: Mapping[str, Any] | None
    ) -> list[Mapping[str, Any]]:
        """Messages, or items of /v1/responses, with their images read, in another thread too. Raises ApiError.

        settings: the request's `mm_processor_kwargs`.
        """
        budget = image_tokens_of(settings)
        return await self.in_thread(field, with_images_read, turns, field, self.model.vision, self.options, budget)

    async def in_thread(self, field: str, function: Callable[..., Value], *arguments: Any, **named: Any) -> Value:
        """What a function of the tokenizer gives in another thread. Raises ApiError for what it refuses."""
        try:
            return await anyio.to_thread.run_sync(partial(function, *arguments, **named), limiter=self._threads)
        except ValueError as error:
            raise errors.from_value_error(self._without_paths(error), field) from error
        except CheckpointError as error:  # of a template that met something that it is not made for
            raise errors.from_value_error(self._without_paths(ValueError(str(error))), field) from error

    def begin(
        self,
        submissions: Sequence[Submission],
        stops: Sequence[str] = (),
        one_call: bool = False,
        middle: int | None = None,
    ) -> Call:
        """Queues submissions, which the caller closes. Raises ApiError where they cannot be queued now."""
        if self.is_draining:
            raise errors.draining()
        if not self.is_started:
            raise errors.not_started()
        timeout = self.options.request_timeout
        call = Call(self.engine, self.tokenizer, self.metrics, submissions, timeout, stops, one_call, middle)
        self.metrics.note_prompt(sum(len(one.prompt_ids) for one in submissions))
        return call

    def _without_paths(self, error: ValueError) -> ValueError:
        """The error without the folder of the checkpoint, which is no client's business."""
        template = self.tokenizer.chat_template
        return error if template is None else ValueError(str(error).replace(f"{template.file.parent}/", ""))
