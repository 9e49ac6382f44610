"""Step runners: they run the steps of a batch and copy the outputs to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from dgemma_ext.model import Cache, Network, PrefillChunk
from dgemma_ext.ops.denoise import CanvasStatus
from dgemma_ext.sampling import CanvasBatch, StepBuffers, StepOutput, denoising_step


class AsyncOutput(Protocol):
    """The output of the steps queued so far, while it is copied to the host."""

    def wait(self) -> StepOutput:
        """Blocks until the copy is done."""
        ...


class StepRunner(Protocol):
    """Runs the steps of a batch in the order in which they are queued.

    repeats: whether it supports `run_until_finished`. errors: row → exception, for rows whose own part of a step raised
    one; the reader removes it. after_row: called with a row after each step of a row by itself, while `buffers` hold
    what that step left there; not called where rows share a pass.
    """

    repeats: bool
    errors: dict[int, Exception]
    after_row: Callable[[int], None] | None

    def step(self, chunks: Sequence[PrefillChunk] = ()) -> None:
        """Queues one step, which also encodes `chunks`."""
        ...

    def copy_to_host(self) -> AsyncOutput:
        """Queues a copy of the output. The result is valid until the second copy after it."""
        ...

    def run_until_finished(self, max_steps: int) -> None:
        """Queues steps until a row with a request is no longer active, at most `max_steps`."""
        ...


class EagerRunner:
    """Runs every step at its call, operator by operator; the host waits for each output.

    buffers: for as many rows as share a pass. The CPU steps row by row with one set of buffers: a shared pass would be
    no faster there, because a canvas of 256 tokens hits all experts by itself.
    """

    repeats = True

    def __init__(self, network: Network, cache: Cache, batch: CanvasBatch, buffers: StepBuffers) -> None:
        self._network, self._cache, self._batch, self._buffers = network, cache, batch, buffers
        # On the CPU a single row is stepped by itself too, so that its first step leaves the self-conditioning out.
        single = batch.rows == 1 and network.device.type == "cpu"
        self._shared = buffers.rows == batch.rows and not single and not network.options.debug
        self._rows = [] if self._shared else [batch.rows_between(row, row + 1) for row in range(batch.rows)]
        self.errors: dict[int, Exception] = {}
        self.after_row: Callable[[int], None] | None = None

    def step(self, chunks: Sequence[PrefillChunk] = ()) -> None:
        self._run_step(chunks)

    def _run_step(self, chunks: Sequence[PrefillChunk] = (), constrained: bool = True, adapted: bool = True) -> None:
        """constrained, adapted: False leaves the rows' grammars, and adapters, out, of which there are none."""
        if self._shared:
            operands = (self._network, self._cache, self._batch, self._buffers)
            denoising_step(*operands, chunks, constrained=constrained, adapted=adapted)
        for index, row in enumerate(self._rows):
            if bool(row.state.active):
                self._step_row(index, row, [chunk for chunk in chunks if chunk.slot == int(row.slot)])

    def _step_row(self, index: int, row: CanvasBatch, chunks: Sequence[PrefillChunk]) -> None:
        # The first step has no self-conditioning. A shared or captured step reads zeros instead.
        is_first = int(row.state.draft[0, 0]) < 0
        try:
            denoising_step(self._network, self._cache, row, self._buffers.first(1), chunks, not is_first)
            if self.after_row is not None:
                self.after_row(index)
        except Exception as error:  # of this row alone: a check of a debug run, no memory, or a fault
            self.errors[index] = error
            row.state.status.fill_(CanvasStatus.NON_FINITE)
            row.state.active.fill_(False)

    def copy_to_host(self) -> AsyncOutput:
        return _Copied(StepOutput.over(self._batch.output.to("cpu", copy=True), self._batch.length))

    def run_until_finished(self, max_steps: int) -> None:
        """Checks on the host what loop_condition_kernel (csrc/cuda/graph_loop.cu) checks on a GPU after every step."""
        for _ in range(max_steps):
            self.step()
            if bool(((self._batch.slot >= 0) & ~self._batch.state.active).any()):
                return


class _Copied:
    """An output that has been copied."""

    def __init__(self, output: StepOutput) -> None:
        self._output = output

    def wait(self) -> StepOutput:
        return self._output
