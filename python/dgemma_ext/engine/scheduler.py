"""The scheduler: requests share a model, and join and leave between denoising steps.

A request's tokens depend only on its prompt, canvas, sampler and seed. Its draws are keyed by (seed, canvas, step,
position), and on the CPU its dense products are computed apart, those of its prompt in blocks of fixed positions: its
bits are the same alone, in any batch, and in whichever pieces its prompt was encoded.

Requests with canvases of the same length form a group (group.py, groups.py) and are stepped together; a single request
is a group of one. `finish_canvas` leaves the steps of a whole canvas to a loop (loop.py).

Threads take turns: a call waits while another thread's is under way.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import dgemma_ext._C as _C
from dgemma_ext import arguments
from dgemma_ext.engine.events import Commit, Draft, Event, Failure, error_of
from dgemma_ext.engine.group import MakeRunner, Progress
from dgemma_ext.engine.groups import CanvasGroups
from dgemma_ext.engine.loop import LOOPS
from dgemma_ext.engine.matching import Matching, matching_of
from dgemma_ext.engine.prefill import Prefill
from dgemma_ext.engine.prefix_cache import PrefixCache
from dgemma_ext.engine.prompt import Prompt, PromptOptions, tokenize_prompt
from dgemma_ext.engine.request import Request, RequestState
from dgemma_ext.engine.served import ServedModel
from dgemma_ext.model import MAX_PREFILL_TOKENS, AdapterName, Network
from dgemma_ext.ops.denoise import CanvasStatus
from dgemma_ext.sampling import (
    MAX_LOGPROBS,
    Alternatives,
    Canvas,
    Choice,
    Grammar,
    ResolvedSampler,
    SamplerConfig,
    resolve_sampler,
)
from dgemma_ext.torch_state import in_own_torch_state, own_torch_state

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Positions of a slot where the caller names none: a slot of the published model then takes 360 MiB, 200 for its rings
# and 160 for its full layers.
_USUAL_LENGTH = 8192


def _exclusive(
    method: Callable[Concatenate[Scheduler, Parameters], Result],
) -> Callable[Concatenate[Scheduler, Parameters], Result]:
    """The method, which waits while another thread is in a method of the same scheduler."""

    @wraps(method)
    def call(self: Scheduler, /, *arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
        with self._lock, own_torch_state():
            return method(self, *arguments, **keywords)

    return call


class Scheduler:
    """Runs up to `max_batch` requests together over one cache; further ones wait their turn.

    max_length: positions that a slot can hold (prompt and committed canvases), default the smaller of the model's
    context and 8,192.
    batched: whether requests share the pass of a step; the default is to share on a GPU and to take turns on a CPU.
    driver: the loop of `finish_canvas`, a name of loop.LOOPS; "eager" runs steps operator by operator on a GPU too, the
    others from captured CUDA graphs, which are made here for every batch size (those of canvases shorter than the
    checkpoint's when they are first needed).
    prefix_cache_bytes: a budget for copies of slots, from which later requests continue whose prompts begin with the
    same tokens; on a CPU their answers are the same bits with it. clock: the time in seconds, for deadlines.

    Threads may share a scheduler: each call waits until no other thread's is under way. `step` and `finish_canvas`
    return the events of all requests to the thread that called them.

    Raises ValueError naming the argument, and dg.NotEnoughMemory, with a table and before anything is allocated, where
    cache and buffers do not fit.
    """

    @in_own_torch_state
    def __init__(
        self,
        model: ServedModel,
        max_batch: int = 8,
        max_length: int | None = None,
        batched: bool | None = None,
        driver: str = "graph",
        make_runner: MakeRunner | None = None,
        prefix_cache_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(getattr(model, "network", None), Network):
            raise arguments.refusal("model", "a dg.DiffusionGemma", model)
        self._lock = threading.RLock()
        self._clock = clock
        self._claimed = False
        self.network = network = model.network
        self.tokenizer, self.defaults, self.vision = model.tokenizer, model.defaults, model.vision
        self.max_batch = max_batch = arguments.integer("max_batch", max_batch, least=1)
        shared = network.device.type == "cuda" if batched is None else arguments.flag("batched", batched)
        self._groups = CanvasGroups(network, max_batch, shared, arguments.choice("driver", driver, LOOPS), make_runner)
        budget = arguments.integer("prefix_cache_bytes", prefix_cache_bytes, end=2**63)
        self.prefix_cache = PrefixCache(budget) if budget else None
        self._names_length = max_length is not None
        positions = min(network.config.max_position_embeddings, _USUAL_LENGTH)
        if max_length is not None:
            positions = arguments.integer("max_length", max_length, least=1)
        self._groups.check_memory(network.config.canvas_length, positions, self.vision, slots=max_batch, kept=budget)
        self.cache = network.new_cache(max_batch, positions)
        self._prefill = Prefill(network, self.cache, self.prefix_cache, self.vision)
        self._groups.begin(self.cache)
        self._free_slots = list(range(max_batch))
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._submitted = 0
        self._events: dict[int, list[Event]] = {}  # request number → events that no call has returned yet

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Scheduler holds buffers that its running requests share, and cannot be copied or pickled")

    @property
    def idle(self) -> bool:
        """Whether no request is running or waiting."""
        with self._lock:
            return not self._running and not self._waiting

    @property
    def free_slots(self) -> int:
        with self._lock:
            return len(self._free_slots)

    def claim(self, model: ServedModel) -> bool:
        """Reserves an idle scheduler for one call, until `release`; False where it has requests or is reserved.

        Its requests are numbered from 0, with the tokenizer and the defaults that the model has now.
        """
        with self._lock:
            if self._claimed or not self.idle:
                return False
            self._claimed = True
            self.tokenizer, self.defaults, self.vision = model.tokenizer, model.defaults, model.vision
            self._prefill.vision = model.vision
            self._submitted, self._events = 0, {}
            return True

    def release(self) -> None:
        """Ends what `claim` began."""
        self._claimed = False

    @_exclusive
    def submit(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        sampler: SamplerConfig | None = None,
        seed: int = 0,
        canvas: Canvas | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        special_tokens: str = "text",
        logprobs: int | None = None,
        deadline: float | None = None,
        grammar: Grammar | None = None,
        logprob_token_ids: Sequence[int] | None = None,
        images: Sequence[Any] | None = None,
        image_tokens: int | None = None,
        adapter: AdapterName = None,
    ) -> Request:
        """Queues a request; it joins at the next step that has a free slot. Arguments as in `generate`.

        deadline: seconds from now; time in the queue counts. logprob_token_ids: the alternatives of the
        log-probabilities by their ids, in place of the most probable.
        Raises ValueError naming the argument, and dg.NotEnoughMemory where the buffers for canvases of another length
        than the checkpoint's do not fit.
        """
        config = self.network.config
        options = PromptOptions(tools, enable_thinking, chat_template_kwargs, special_tokens, image_tokens)
        tokenized = tokenize_prompt(prompt, self, options=options, images=images)
        resolved = resolve_sampler(sampler, self.defaults, config.canvas_length)
        limit = self.defaults.max_new_tokens if max_new_tokens is None else max_new_tokens
        if canvas is not None:
            arguments.instance("canvas", canvas, Canvas, "a dg.Canvas or None").check(
                config.vocab_size, resolved.max_denoising_steps
            )
        limit = arguments.integer("max_new_tokens", limit, least=1)
        matching = None if grammar is None else self._matching(grammar, tokenized.ids, resolved, limit, canvas)
        request = Request(
            number=self._submitted,
            prompt=tokenized,
            vocab_size=config.vocab_size,
            max_new_tokens=limit,
            sampler=resolved,
            seed=arguments.integer("seed", seed, end=2**63),
            canvas=canvas if matching is None else matching.content,
            tokenizer=self.tokenizer,
            cancel=self._cancel,
            alternatives=_alternatives(logprobs, logprob_token_ids, config.vocab_size),
            is_late=self._late_after(deadline),
            matching=matching,
            adapter=self.network.adapters.named(adapter),
        )
        self._check_length(request, " by default" if max_new_tokens is None else "")
        self._groups.make_for(request, (*self._running, *self._waiting), self.vision)
        self._submitted += 1
        self._waiting.append(request)
        return request

    def _matching(
        self, grammar: Grammar, ids: list[int], sampler: ResolvedSampler, max_new_tokens: int, canvas: Canvas | None
    ) -> Matching:
        arguments.instance("grammar", grammar, Grammar, "a dg.Regex, dg.JsonSchema, dg.Choice, dg.ToolCalls or None")
        if self.network.device.type != "cpu" and not _C.has_cuda():
            raise ValueError("grammar is given, and this build has no kernels for a GPU")
        if self.tokenizer is None:
            raise ValueError("grammar needs a checkpoint with tokenizer.json")
        size, pad_id = self.network.config.vocab_size, self.defaults.pad_token_id
        return matching_of(grammar, self.tokenizer, size, pad_id, ids, sampler, max_new_tokens, canvas)

    def step(self) -> list[Event]:
        """Admits waiting requests, then runs one denoising step of every running one; returns the events in order.

        Without any it returns none.
        """
        return self._advance(whole=False)

    def finish_canvas(self) -> list[Event]:
        """Admits waiting requests, then runs denoising steps until a canvas is finished; returns no Drafts.

        The tokens are the same as with `step`.
        """
        return [event for event in self._advance(whole=True) if not isinstance(event, Draft)]

    @_exclusive
    def _advance(self, whole: bool) -> list[Event]:
        """Runs one step of every running request, or with `whole` the steps that finish a canvas of every group."""
        while self._waiting and self._free_slots:
            request = self._waiting.popleft()
            request._slot = self._free_slots.pop(0)
            request.state = RequestState.RUNNING
            self._running.append(request)
        beginning = [request for request in self._running if not request._in_canvas]
        if self.prefix_cache is not None:
            beginning.sort(key=lambda request: request._tokens.waiting)  # a prompt before those that it begins
        for index, request in enumerate(beginning):
            with self._failing([request]), self._alone(request):
                self._begin_canvas(request, beginning[index + 1 :])
        for group in self._groups.values():
            if group.members:
                with self._failing(group.members):
                    progress_of = group.run() if whole else group.step()
                for request, progress in progress_of.items():
                    if request.state is RequestState.RUNNING:  # not cancelled while the step was under way
                        with self._failing([request]), self._alone(request):
                            self._events[request.number] = self._events_of(request, progress)
        events, self._events = self._events, {}
        return [event for number in sorted(events) for event in events[number]]

    @contextmanager
    def _failing(self, requests: Sequence[Request]) -> Iterator[None]:
        """Ends these requests where what runs inside raises: nobody knows what it has left in their slots and rows.

        The exception goes on to the caller; Failures, and events of other requests, are in the next call's.
        """
        try:
            yield
        except BaseException as error:
            for request in requests:
                self._events[request.number] = [self._fail(request, RuntimeError(f"a step was broken off: {error!r}"))]
            raise

    @contextmanager
    def _alone(self, request: Request) -> Iterator[None]:
        """An exception of what runs inside, which is this request's own, becomes its Failure; the others go on."""
        try:
            yield
        except Exception as error:
            self._events[request.number] = [self._fail(request, error_of(request, error, step=0))]

    def _begin_canvas(self, request: Request, others: Sequence[Request]) -> None:
        """Adds the next canvas to its group. The tokens that it sees are encoded here, or left to its first step.

        others: requests that begin a canvas after this one. Where the prefix cache can hand them what this one encodes,
        it is encoded here.
        """
        is_shared = self._prefill.restore(request, others)
        index, sampler = len(request.denoising_steps), request.sampler
        request._length = sampler.length_of(index, request._longest)
        group = self._groups[request._length]
        waiting = request._tokens.waiting
        if waiting and (is_shared or waiting + group.num_prefill > MAX_PREFILL_TOKENS):
            self._prefill.encode(request, waiting)
        chunk = self._prefill.chunk(request)
        scorer = request.choice_scores if isinstance(request.grammar, Choice) else None
        constraint = request.constraint(request._length)
        asked = (request.alternatives, request._is_late, constraint, scorer, request._adapter)
        group.join(request, request._slot, sampler, request.seed, index, request.canvas, chunk, *asked)
        request.denoising_steps.append(0)
        request._in_canvas = True

    def _events_of(self, request: Request, progress: Progress) -> list[Event]:
        """The events of a request after its last steps."""
        output, row = progress.output, progress.row
        if progress.error is not None or progress.status is CanvasStatus.NON_FINITE:
            # `step` is the next step to run; a failed step does not advance it.
            request.denoising_steps[-1] = progress.num_steps + 1
            error = progress.error or FloatingPointError("a logit or a statistic is not finite")
            return [self._fail(request, error_of(request, error, int(output.step[row])))]
        self._prefill.note(request, request._tokens.waiting)
        request.denoising_steps[-1] = progress.num_steps
        draft = Draft(
            request=request,
            canvas_index=len(request.denoising_steps) - 1,
            step=int(output.step[row]) - 1,
            token_ids=tuple(output.draft[row].tolist()),
            accepted=output.accepted[row].clone(),
            entropy=output.entropy[row].clone(),
            mean_entropy=float(output.mean_entropy[row]),
        )
        return [draft, self._commit(request, draft, progress)] if progress.is_over else [draft]

    def _commit(self, request: Request, draft: Draft, progress: Progress) -> Commit:
        """Adds the finished canvas to the answer, which may end with it."""
        request.follow(draft.token_ids)
        request.choices = progress.choices
        kept = request.keep(draft.token_ids, progress.out_of_time)
        logprobs = None if progress.logprobs is None else tuple(progress.logprobs[: len(kept)])
        if logprobs is not None and request.logprobs is not None:
            request.logprobs += logprobs
        text, thinking = request.new_words()
        self._end_canvas(request)
        if request.finish_reason is not None:
            request.state = RequestState.FINISHED
            self._release(request)
        else:
            # The first step of the next canvas encodes this one; the last canvas of an answer is never encoded.
            request._tokens.append(draft.token_ids)
        return Commit(
            request=request,
            canvas_index=draft.canvas_index,
            token_ids=tuple(kept),
            text=text,
            denoising_steps=request.denoising_steps[-1],
            finish_reason=request.finish_reason,
            thinking=thinking,
            logprobs=logprobs,
        )

    def _fail(self, request: Request, error: Exception) -> Failure:
        request.error = error
        request.state = RequestState.FAILED
        self._release(request)
        return Failure(request, error)

    @_exclusive
    def _cancel(self, request: Request) -> bool:
        if request.done:
            return False
        if request.state is RequestState.WAITING:
            self._waiting.remove(request)
        else:
            self._release(request)
        request.state = RequestState.CANCELLED
        return True

    def _release(self, request: Request) -> None:
        self._running.remove(request)
        self.cache.free(request._slot)
        self._free_slots.append(request._slot)
        request._slot = -1
        self._end_canvas(request)

    def _end_canvas(self, request: Request) -> None:
        request._in_canvas = False
        group = self._groups.get(request._length)
        if group is not None:
            group.leave(request)

    def _late_after(self, deadline: float | None) -> Callable[[], bool] | None:
        """Whether so many seconds have passed since this call; None where there is no deadline."""
        if deadline is None:
            return None
        clock = self._clock
        end = clock() + arguments.number("deadline", deadline)
        return lambda: clock() >= end

    def _check_length(self, request: Request, default: str) -> None:
        """Raises ValueError for a request whose positions do not fit the model's context or a slot of the cache."""
        context, canvas_length = self.network.config.max_position_embeddings, request.sampler.canvas_length
        cached, all_positions = request.positions
        given = f"prompt of {len(request.prompt_ids)} tokens with max_new_tokens {request.max_new_tokens}{default}"
        if all_positions > context:
            raise ValueError(
                f"{given}, in canvases of {canvas_length}, needs {all_positions} positions, more than the model's "
                f"context of {context}"
            )
        if cached > self.cache.max_length:
            default = "" if self._names_length else " by default"
            limit = f"max_length is {self.cache.max_length}{default}"
            raise ValueError(f"{given} needs {cached} positions in the cache; {limit}")


def _alternatives(logprobs: int | None, ids: Sequence[int] | None, vocab_size: int) -> Alternatives | None:
    if ids is not None:
        if logprobs is not None:
            raise ValueError("logprob_token_ids is given, and logprobs too; they say the same in two ways")
        found = arguments.integers("logprob_token_ids", ids, "a list of token ids", end=vocab_size, entry="a token id")
        return tuple(found)
    return None if logprobs is None else arguments.integer("logprobs", logprobs, end=MAX_LOGPROBS + 1)
