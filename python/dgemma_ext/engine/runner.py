"""Who runs the steps of a batch, and how the host learns what they did: step runners and their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dgemma_ext.model import Cache, Network, PrefillChunk
from dgemma_ext.ops.denoise import CanvasStatus
from dgemma_ext.sampling import CanvasBatch, StepBuffers, StepOutput, denoising_step


class AsyncOutput(Protocol):
    """The output of the steps queued so far, on its way to the host."""

    def wait(self) -> StepOutput:
        """Blocks until it is there."""
        ...


class StepRunner(Protocol):
    """Runs the steps of a batch in the order in which they are queued.

    repeats: whether it has `run_until_finished`. errors: messages by row, of rows that failed by an error of the host
    (a debug run's check of every layer); whoever reads one takes it out.
    """

    repeats: bool
    errors: dict[int, str]

    def step(self, chunks: Sequence[PrefillChunk] = ()) -> None:
        """Queues one step, which encodes `chunks` for its rows to see."""
        ...

    def copy_to_host(self) -> AsyncOutput:
        """Queues a copy of the output. It is good until the second copy after it."""
        ...

    def run_until_finished(self, max_steps: int) -> None:
        """Queues steps that end by themselves: when a row with a request is not active any more, or at the cap."""
        ...


class EagerRunner:
    """Runs every step as it is called, operator by operator; the host waits for each output.

    buffers: for as many rows as share a pass. The CPU steps row by row: a canvas of 256 tokens meets all experts
    anyway, so that a shared pass would make nothing faster, and one set of buffers serves all rows.
    """

    repeats = True

    def __init__(self, network: Network, cache: Cache, batch: CanvasBatch, buffers: StepBuffers) -> None:
        self._network, self._cache, self._batch, self._buffers = network, cache, batch, buffers
        # A single row of the CPU's goes the way of several: the host may look at it.
        alone = batch.rows == 1 and network.device.type == "cpu"
        self._shared = buffers.rows == batch.rows and not alone and not network.options.debug
        self._rows = [] if self._shared else [batch.rows_between(row, row + 1) for row in range(batch.rows)]
        self.errors: dict[int, str] = {}

    def step(self, chunks: Sequence[PrefillChunk] = ()) -> None:
        if self._shared:
            denoising_step(self._network, self._cache, self._batch, self._buffers, chunks)
        for row, one in enumerate(self._rows):
            if bool(one.state.active):
                self._step_row(row, one, [chunk for chunk in chunks if chunk.slot == int(one.slot)])

    def _step_row(self, row: int, one: CanvasBatch, chunks: Sequence[PrefillChunk]) -> None:
        # The first step has no self-conditioning, and here nothing keeps it from being left out.
        is_first = int(one.state.draft[0, 0]) < 0
        try:
            denoising_step(self._network, self._cache, one, self._buffers.first(1), chunks, not is_first)
        except FloatingPointError as error:
            self.errors[row] = str(error)
            one.state.status.fill_(CanvasStatus.NON_FINITE)
            one.state.active.fill_(False)

    def copy_to_host(self) -> AsyncOutput:
        return _Copied(StepOutput.over(self._batch.output.to("cpu", copy=True), self._batch.length))

    def run_until_finished(self, max_steps: int) -> None:
        """What loop_condition_kernel (csrc/cuda/graph_loop.cu) decides after every step, here on the host."""
        for _ in range(max_steps):
            self.step()
            if bool(((self._batch.slot >= 0) & ~self._batch.state.active).any()):
                return


class _Copied:
    """An output that is there: the copy has waited for the device."""

    def __init__(self, output: StepOutput) -> None:
        self._output = output

    def wait(self) -> StepOutput:
        return self._output
