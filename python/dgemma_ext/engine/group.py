"""Groups of requests that share denoising steps: they join and leave between steps, and their rows stay dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakMethod

import torch
from torch import Tensor

from dgemma_ext.engine.loop import loop_for
from dgemma_ext.engine.runner import EagerRunner, StepRunner
from dgemma_ext.errors import GrammarError
from dgemma_ext.model import Cache, LoadedAdapter, Network, PrefillChunk
from dgemma_ext.ops.denoise import CanvasStatus
from dgemma_ext.sampling import (
    Alternatives,
    Canvas,
    CanvasBatch,
    Constraint,
    ResolvedSampler,
    StepBuffers,
    StepOutput,
    TokenLogprobs,
    begin_canvas,
    canvas_logprobs,
    make_canvas_batch,
    make_step_buffers,
)

Member = TypeVar("Member")
Scorer = Callable[[Tensor, float, list[int]], dict[str, float] | None]

# make_runner(network, cache, batch, buffers) → the runner for the batch.
MakeRunner = Callable[[Network, Cache, CanvasBatch, StepBuffers], StepRunner]


def bucket_of(requests: int) -> int:
    """The batch size for a number of requests: the next power of two, so that few graphs are captured."""
    return 1 << max(requests - 1, 0).bit_length()


@dataclass(frozen=True)
class Progress:
    """The progress of a member's canvas: its row of a step's output."""

    output: StepOutput
    row: int
    num_steps: int  # completed steps; a step that fails does not count
    error: Exception | None = None  # what this member's own part of the step raised
    out_of_time: bool = False  # whether its time was up before the canvas had finished
    logprobs: list[TokenLogprobs] | None = None  # of a canvas that is over, where they were asked for
    choices: dict[str, float] | None = None  # of a canvas that is over, where it has a scorer

    @property
    def status(self) -> CanvasStatus:
        return CanvasStatus(int(self.output.status[self.row]))

    @property
    def is_over(self) -> bool:
        return self.out_of_time or self.status is not CanvasStatus.RUNNING


@dataclass
class _Row:
    """The host's record of a row, which needs no read from the device."""

    first_step: int
    next_step: int  # as of the last output read
    max_steps: int
    masks: int  # number of masks of allowed tokens
    chunk: PrefillChunk | None  # tokens for the first step to encode
    alternatives: Alternatives | None  # for each token; None for no log-probabilities
    is_late: Callable[[], bool] | None  # whether its time is up; None where it has no deadline
    scorer: Scorer | None  # of the choices that it is between
    is_looked_at: bool = False  # since the last output
    out_of_time: bool = False
    logprobs: list[TokenLogprobs] | None = None
    choices: dict[str, float] | None = None


class CanvasGroup(Generic[Member]):
    """Up to `capacity` members with canvases of one length. The n members use rows 0 to n - 1; a step runs over the
    next power of two.

    shared: whether the rows of a step share one pass; otherwise they are stepped by turns over one set of buffers.
    driver: a name of loop.LOOPS. make_runner: makes the runner of each batch size, when it is first needed or in
    `make_runners`.
    """

    def __init__(
        self,
        network: Network,
        cache: Cache,
        capacity: int,
        length: int,
        shared: bool = True,
        driver: str = "eager",
        make_runner: MakeRunner = EagerRunner,
    ) -> None:
        self._network, self._cache, self._shared = network, cache, shared
        self._batch = make_canvas_batch(network, bucket_of(capacity), length)
        self._buffers = make_step_buffers(network, self._batch.rows if shared else 1, length)
        self._driver, self._make_runner = driver, make_runner
        self._runners: dict[int, StepRunner] = {}
        self._members: list[Member] = []
        self._rows: list[_Row] = []

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._members)

    @property
    def num_prefill(self) -> int:
        """The number of tokens that the next pass encodes beside its canvases."""
        return sum(map(len, self._chunks())) if self._shared else 0

    def join(
        self,
        member: Member,
        slot: int,
        sampler: ResolvedSampler,
        seed: int,
        index: int,
        content: Canvas | None = None,
        chunk: PrefillChunk | None = None,
        alternatives: Alternatives | None = None,
        is_late: Callable[[], bool] | None = None,
        constraint: Constraint | None = None,
        scorer: Scorer | None = None,
        adapter: LoadedAdapter | None = None,
    ) -> None:
        """Begins canvas `index` of a request. It sees the slot and `chunk`, which its first step encodes.

        alternatives: how many or which to give for each token, None for no log-probabilities.
        is_late: asked after every step whether to take the canvas as it is. constraint: of a grammar. scorer: gives
        the scores of choices by the raw logits of a canvas's last step, their softcap, and its draft. adapter: whose
        factors stand beside the weights of the canvas.
        """
        row, length = len(self._members), self._batch.length
        prefix = self._cache.length(slot) + (0 if chunk is None else len(chunk))
        try:
            masks = begin_canvas(self._network, self._batch, row, sampler, seed, index, content)
            positions = torch.arange(prefix, prefix + length, device=self._network.device)
            self._batch.place(row, slot, prefix, self._network.rotary_tables(positions))
            if constraint is not None:
                self._batch.constraints.place(row, constraint)
            if adapter is not None:
                self._batch.adapters.place(row, adapter)
        except BaseException:
            self._batch.clear(row)  # steps may run over rows that no member has
            raise
        first_step = 1 if content is None else content.first_step(index, sampler.canvas_length)
        self._members.append(member)
        last_step = sampler.max_denoising_steps
        self._rows.append(_Row(first_step, first_step, last_step, masks, chunk, alternatives, is_late, scorer))

    def leave(self, member: Member) -> None:
        """Frees the member's row and moves the last row there. No-op for a non-member."""
        if member not in self._members:
            return
        row, last = self._members.index(member), len(self._members) - 1
        if row != last:
            self._batch.move(last, row, self._rows[last].masks)
            self._members[row], self._rows[row] = self._members[last], self._rows[last]
        self._batch.clear(last)
        self._members.pop()
        self._rows.pop()

    def step(self) -> dict[Member, Progress]:
        """One denoising step of every member."""
        runner = self.runner()
        runner.step(self._take_chunks())
        return self._progress(runner, runner.copy_to_host().wait())

    def run(self) -> dict[Member, Progress]:
        """Steps until a member's canvas is over. Where one has a deadline, the host looks at the clock after each."""
        if any(row.is_late is not None for row in self._rows):
            progress_of = self.step()
            while not any(progress.is_over for progress in progress_of.values()):
                progress_of = self.step()
            return progress_of
        max_steps = min(row.max_steps - row.next_step + 1 for row in self._rows)
        runner = self.runner()
        loop = loop_for(runner, self._driver)
        return self._progress(runner, loop(runner, len(self._members), max_steps, self._take_chunks()))

    def make_runners(self) -> None:
        """Makes the runners of all batch sizes: none is captured while requests wait for it.

        The largest comes first, because the graphs share the memory of their steps.
        """
        for power in reversed(range(self._batch.rows.bit_length())):
            self._runner_of(1 << power)

    def runner(self) -> StepRunner:
        """The runner for the current number of members."""
        return self._runner_of(bucket_of(len(self._members)))

    def _runner_of(self, rows: int) -> StepRunner:
        if rows not in self._runners:
            buffers = self._buffers.first(rows) if self._shared else self._buffers
            batch = self._batch.rows_between(0, rows)
            runner = self._runners[rows] = self._make_runner(self._network, self._cache, batch, buffers)
            runner.after_row = _weakly(self._look_by_turns)
        return self._runners[rows]

    def _chunks(self) -> list[PrefillChunk]:
        return [row.chunk for row in self._rows if row.chunk is not None]

    def _take_chunks(self) -> list[PrefillChunk]:
        chunks = self._chunks()
        for row in self._rows:
            row.chunk = None
        return chunks

    def _progress(self, runner: StepRunner, output: StepOutput) -> dict[Member, Progress]:
        found = {}
        for index, (member, row) in enumerate(zip(self._members, self._rows, strict=True)):
            row.next_step = int(output.step[index])
            error = runner.errors.pop(index, None)
            if not int(output.matches[index]):
                error = GrammarError("no canvas matches it")
            if not row.is_looked_at and error is None:
                try:
                    self._look(index, CanvasStatus(int(output.status[index])), self._buffers.logits[index])
                except Exception as failure:
                    error = failure
            row.is_looked_at = False
            num_steps = row.next_step - row.first_step
            found[member] = Progress(output, index, num_steps, error, row.out_of_time, row.logprobs, row.choices)
        return found

    def _look_by_turns(self, index: int) -> None:
        """After the step of one row by itself; the next row's overwrites the logits."""
        self._look(index, CanvasStatus(int(self._batch.state.status[index])), self._buffers.logits[0])

    def _look(self, index: int, status: CanvasStatus, logits: Tensor) -> None:
        """Asks for the time, and reads what is asked for of a canvas that is over. logits: raw, of its step."""
        row, state = self._rows[index], self._batch.state
        row.is_looked_at = True
        if status is CanvasStatus.NON_FINITE:
            return
        row.out_of_time = status is CanvasStatus.RUNNING and row.is_late is not None and row.is_late()
        if status is CanvasStatus.RUNNING and not row.out_of_time:
            return
        softcap = self._network.config.final_logit_softcapping
        if row.scorer is not None:
            row.choices = row.scorer(logits, softcap, state.draft[index].tolist())
        if row.alternatives is not None:
            row.logprobs = canvas_logprobs(logits, softcap, state.draft[index], state.pinned[index], row.alternatives)


def _weakly(method: Callable[[int], None]) -> Callable[[int], None]:
    """The method without a reference to its object, so that a dropped scheduler frees its network at once."""
    reference: WeakMethod[Callable[[int], None]] = WeakMethod(method)

    def call(row: int) -> None:
        found = reference()
        if found is not None:
            found(row)

    return call
