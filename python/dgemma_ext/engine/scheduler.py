"""Requests that share a model: they join and leave between denoising steps.

A request's tokens depend on its prompt, sampler and seed alone. Its draws are keyed by (seed, canvas, step,
position), and on the CPU its dense products are its own, so the same bits come out alone, in a batch, or joined late by
others.

Two forms. One by one, the CPU's: a canvas of 256 tokens meets all experts anyway, and a batch would make nothing faster
there. Batched, a GPU's: requests with canvases of one length share each denoising step (canvas_group.py), and
`finish_canvas` leaves the steps of a whole canvas to a loop (loop.py). Requests whose canvas rules the allowed tokens,
and all of a debug run, go one by one in both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import torch

from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine import cuda_loop
from dgemma_ext.engine.canvas_group import CanvasGroup, MakeDevice, Progress
from dgemma_ext.engine.events import Commit, Draft, Event, Failure
from dgemma_ext.engine.loop import DRIVERS, DirectDevice
from dgemma_ext.engine.memory import batch_plan, check_memory
from dgemma_ext.engine.request import Request, RequestState
from dgemma_ext.errors import NonFiniteError
from dgemma_ext.model.cache import SnapshotStore
from dgemma_ext.model.joint_pass import JOINT_TOKENS
from dgemma_ext.ops.denoise import CanvasStatus
from dgemma_ext.sampling.canvas_batch import Told, bucket_of
from dgemma_ext.sampling.sampler import Canvas, SamplerConfig, begin_canvas, denoising_step

# One message, a whole chat (role/content dicts), or token ids.
Prompt = str | Sequence[dict[str, object]] | Sequence[int]


class Scheduler:
    """Runs up to `max_batch` requests together over one cache; further ones wait their turn.

    max_length: positions that a slot can hold (prompt and committed canvases), default the smaller of the model's
    context and 8,192 (a slot of the published model takes 360 MiB then: 200 for its rings, 160 for its full layers).
    batched: whether requests share a step, default on a GPU. driver: how `finish_canvas` drives a batch's steps, of
    loop.DRIVERS; "eager" runs them operator by operator on a GPU too, the others from captured CUDA graphs.

    Raises dg.NotEnoughMemory, with a table and before anything is made, where cache and buffers of a batch do not fit.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        max_batch: int = 8,
        max_length: int | None = None,
        batched: bool | None = None,
        driver: str = "graph",
        make_device: MakeDevice | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        if driver not in DRIVERS:
            raise ValueError(f"driver must be one of {', '.join(DRIVERS)}, got {driver!r}")
        self.model = model
        self.max_batch = max_batch
        self._batched = model.device.type == "cuda" if batched is None else batched
        self._driver, self._make_device = driver, make_device or _device_maker(model.device, driver)
        positions = max_length or min(model.config.max_position_embeddings, 8192)
        length = model.config.canvas_length
        if self._batched:
            plan = batch_plan(model, bucket_of(max_batch), length, positions, slots=max_batch)
            check_memory(plan, 0, model.device)
        self.cache = model.new_cache(max_batch, positions)
        # By canvas length. The checkpoint's own is always there.
        self._groups: dict[int, CanvasGroup[Request]] = {}
        if self._batched:
            self._groups[length] = self._new_group(length)
        self._free_slots = list(range(max_batch))
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._submitted = 0
        # Raw logits of the canvas in hand: requests take turns, so one buffer serves all.
        self._logits: torch.Tensor | None = None

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self._running and not self._waiting

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def number_from_zero(self) -> None:
        """The next request is number 0. For an idle scheduler that begins another call's work."""
        if not self.idle:
            raise RuntimeError("requests are running or waiting, and their numbers must stay different")
        self._submitted = 0

    def submit(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        sampler: SamplerConfig | None = None,
        seed: int = 0,
        canvas: Canvas | None = None,
        snapshots: SnapshotStore | None = None,
    ) -> Request:
        """Queues a request; it joins at the next step that has a free slot. Arguments as in `generate`.

        snapshots: where to look for an encoded beginning of the prompt and to leave new ones.
        Raises ValueError naming the argument, and dg.NotEnoughMemory where the buffers for a batch of canvases of
        another length than the checkpoint's do not fit.
        """
        model = self.model
        ids = prompt_to_ids(model, prompt)
        resolved = (sampler or SamplerConfig()).resolve(model.defaults, model.config.canvas_length)
        limit = model.defaults.max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {limit}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")
        if canvas is not None:
            canvas.check(model.config.vocab_size, resolved.max_denoising_steps)
        needed = positions_needed(len(ids), limit, resolved.canvas_length)
        if len(ids) + resolved.canvas_length > model.config.max_position_embeddings:
            raise ValueError(
                f"prompt has {len(ids)} tokens; with a canvas of {resolved.canvas_length} that is more than the "
                f"model's context of {model.config.max_position_embeddings}"
            )
        if needed > self.cache.max_length:
            raise ValueError(
                f"prompt of {len(ids)} tokens with max_new_tokens {limit} needs {needed} positions in the cache; "
                f"max_length is {self.cache.max_length}"
            )
        request = Request(self, self._submitted, ids, limit, resolved, seed, canvas, snapshots)
        if not self._goes_alone(request):
            self._need_groups(request)
        self._submitted += 1
        self._waiting.append(request)
        return request

    def step(self) -> list[Event]:
        """Admits what fits, then makes one denoising step of every running request; returns what happened, in order."""
        return self._advance(whole=False)

    def finish_canvas(self) -> list[Event]:
        """Admits what fits, then makes denoising steps until a canvas is finished, without a Draft for each.

        The same tokens as by `step`. Requests go on by as many steps as their batch makes; none is stopped early.
        """
        return [event for event in self._advance(whole=True) if not isinstance(event, Draft)]

    def _advance(self, whole: bool) -> list[Event]:
        """One step of every running request; with `whole` as many as finish a canvas of every batch."""
        while self._waiting and self._free_slots:
            request = self._waiting.popleft()
            request._slot = self._free_slots.pop(0)
            request.state = RequestState.RUNNING
            self._running.append(request)
        running = list(self._running)
        events: dict[int, list[Event]] = {}
        for request in running:
            if request.state is not RequestState.RUNNING:
                continue  # cancelled while this step was under way
            try:
                if not request._in_canvas:
                    self._begin(request)
                if self._goes_alone(request):
                    events[request.number] = self._advance_alone(request, whole)
            except (NonFiniteError, FloatingPointError) as error:
                events[request.number] = [self._fail(request, error)]
        for group in self._groups.values():
            if group.members:
                for request, progress in (group.run() if whole else group.step()).items():
                    if request.state is RequestState.RUNNING:
                        events[request.number] = self._told(request, progress)
        return [event for request in running for event in events.get(request.number, [])]

    def _begin(self, request: Request) -> None:
        """The canvas, and what it wants to see: in the cache, or left to its first step."""
        self._recall(request)
        index, sampler = len(request.denoising_steps), request.sampler
        request._length = sampler.length_of(index, request._longest)
        alone = self._goes_alone(request)
        taken = 0 if alone else self._groups[request._length].pending
        if len(request._uncached) + taken > JOINT_TOKENS:
            self.model.encode(torch.tensor([request._uncached]), self.cache, slots=[request._slot])
            self._note_encoded(request)
        work = begin_canvas(self.model, sampler, request.seed, index, request.canvas, request._length)
        request.denoising_steps.append(0)
        request._in_canvas = True
        if alone:
            request._work = work
            return
        first_step = 1 if request.canvas is None else request.canvas.first_step(index, sampler.canvas_length)
        group = self._groups[request._length]
        steps = (first_step, sampler.max_denoising_steps)
        group.join(request, work, request._slot, *steps, self._pending(request))

    def _advance_alone(self, request: Request, whole: bool) -> list[Event]:
        """One denoising step (with `whole` all that the canvas has left), and the commit after the last."""
        while True:
            work = request._work
            assert work is not None, "the canvas has begun"
            step = int(work.step)
            logits, pending = self._logits_buffer(work.length), self._pending(request)
            denoising_step(self.model, self.cache, request._slot, work, logits, pending=pending)
            self._note_encoded(request)
            request.denoising_steps[-1] += 1
            told = Told(work.status, work.step, work.mean_entropy, work.draft, work.entropy, work.accepted)
            status, draft = self._draft(request, told, 0, step)
            if status is not CanvasStatus.RUNNING:
                return [draft, self._commit(request, draft)]
            if not whole:
                return [draft]

    def _told(self, request: Request, progress: Progress) -> list[Event]:
        """What a batch's steps made of a request's canvas."""
        self._note_encoded(request)
        told, row = progress.told, progress.row
        failed = int(told.status[row]) == CanvasStatus.NON_FINITE
        # The step that fails is not counted by the device, and the one after the last that it made is told.
        request.denoising_steps[-1] = progress.steps + failed
        try:
            status, draft = self._draft(request, told, row, int(told.step[row]) - (not failed))
        except NonFiniteError as error:
            return [self._fail(request, error)]
        if status is CanvasStatus.RUNNING:
            return [draft]
        return [draft, self._commit(request, draft)]

    def _draft(self, request: Request, told: Told, row: int, step: int) -> tuple[CanvasStatus, Draft]:
        """A row of what was told after `step`. Raises NonFiniteError where a number was not finite."""
        status = CanvasStatus(int(told.status[row]))
        if status is CanvasStatus.NON_FINITE:
            raise NonFiniteError("a logit or a statistic is not finite", request=request.number, step=step)
        return status, Draft(
            request=request,
            canvas_index=len(request.denoising_steps) - 1,
            step=step,
            token_ids=tuple(told.draft[row].tolist()),
            accepted=told.accepted[row].cpu().clone(),
            entropy=told.entropy[row].cpu().clone(),
            mean_entropy=float(told.mean_entropy[row]),
        )

    def _recall(self, request: Request) -> None:
        """Puts a saved beginning of the prompt into the slot, where there is one."""
        slot, store = request._slot, request.snapshots
        if store is None or request._cached:
            return
        saved = store.longest_prefix(request._uncached)
        if saved is not None:
            self.cache.restore(slot, saved)
            request._cached = request._uncached[: saved.length]
            request._uncached = request._uncached[saved.length :]
            if not request._uncached:
                store.add(request._cached, saved)  # the newest again

    def _pending(self, request: Request) -> torch.Tensor | None:
        """What the canvas's first step is to encode: int [1, n]."""
        # Copied without waiting for what runs on a GPU.
        ids = torch.tensor([request._uncached])
        return ids.to(self.model.device, non_blocking=True) if request._uncached else None

    def _note_encoded(self, request: Request) -> None:
        """The slot holds all that the canvas wants to see."""
        if request._uncached:
            request._cached = request._cached + request._uncached
            request._uncached = []
            if request.snapshots is not None:
                request.snapshots.add(request._cached, self.cache.snapshot(request._slot))

    def _commit(self, request: Request, draft: Draft) -> Commit:
        """Takes the finished canvas into the answer; ends the request at an end of text or at its length."""
        room = request.max_new_tokens - len(request.token_ids)
        kept = list(draft.token_ids[:room])
        ends = [i for i, token in enumerate(kept) if token in request.sampler.eos_token_ids]
        if ends:
            kept = kept[: ends[0] + 1]
            request.finish_reason = "eos"
        elif len(draft.token_ids) >= room:
            request.finish_reason = "length"
        request.token_ids += kept
        self._end_canvas(request)
        if request.finish_reason is not None:
            request.state = RequestState.FINISHED
            self._release(request)
        else:
            # Encoded by the next canvas's first step, and the last canvas of an answer not at all.
            request._uncached = list(draft.token_ids)
        return Commit(
            request=request,
            canvas_index=draft.canvas_index,
            token_ids=tuple(kept),
            text=request.new_text(),
            denoising_steps=request.denoising_steps[-1],
            finish_reason=request.finish_reason,
        )

    def _fail(self, request: Request, error: Exception) -> Failure:
        if isinstance(error, FloatingPointError):
            step = int(request._work.step) if request._work is not None else 0
            error = NonFiniteError(str(error), request=request.number, step=step)
        request.error = error
        request.state = RequestState.FAILED
        self._release(request)
        return Failure(request, error)

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
        request._work = None
        request._in_canvas = False
        group = self._groups.get(request._length)
        if group is not None:
            group.leave(request)

    def _goes_alone(self, request: Request) -> bool:
        rules_tokens = request.canvas is not None and request.canvas.allowed is not None
        return not self._batched or rules_tokens or self.model.debug

    def _need_groups(self, request: Request) -> None:
        """Buffers for canvases of a request's lengths. Those of lengths that nobody has any more are given up first."""
        missing = request.canvas_lengths - self._groups.keys()
        if not missing:
            return
        wanted = {self.model.config.canvas_length}.union(
            *(one.canvas_lengths for one in (*self._running, *self._waiting, request))
        )
        self._groups = {kept: group for kept, group in self._groups.items() if kept in wanted}
        for length in missing:
            plan = batch_plan(self.model, bucket_of(self.max_batch), length, self.cache.max_length, slots=0)
            check_memory(plan, 0, self.model.device)
            self._groups[length] = self._new_group(length)

    def _new_group(self, length: int) -> CanvasGroup[Request]:
        return CanvasGroup(self.model, self.cache, self.max_batch, length, self._driver, self._make_device)

    def _logits_buffer(self, length: int) -> torch.Tensor:
        if self._logits is None or self._logits.shape[1] < length:
            shape = (1, length, self.model.config.vocab_size)
            self._logits = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        return self._logits[:, :length]


def _device_maker(device: torch.device, driver: str) -> MakeDevice:
    if device.type != "cuda":
        return DirectDevice
    return cuda_loop.LaunchDevice if driver == "eager" else cuda_loop.cuda_device


def positions_needed(prompt_length: int, max_new_tokens: int, canvas_length: int) -> int:
    """Cache rows of a request: its prompt and every canvas but the last, which is never encoded."""
    canvases = -(-max_new_tokens // canvas_length)
    return prompt_length + (canvases - 1) * canvas_length


def prompt_to_ids(model: DiffusionGemma, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; text goes through the chat template. Raises ValueError naming the argument."""
    if not isinstance(prompt, str) and all(isinstance(part, int) for part in prompt):
        ids = list(cast(Sequence[int], prompt))
    elif model.tokenizer is None:
        raise ValueError("prompt is text, and the checkpoint has no tokenizer.json; give token ids")
    elif isinstance(prompt, str) and not prompt.strip():
        raise ValueError("prompt is empty")
    else:
        ids = model.tokenizer.encode_prompt(cast(Any, prompt))
    if not ids:
        raise ValueError("prompt is empty")
    for position, token in enumerate(ids):
        if not 0 <= token < model.config.vocab_size:
            raise ValueError(f"prompt[{position}] must be a token id in [0, {model.config.vocab_size}), got {token}")
    return ids
