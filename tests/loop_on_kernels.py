"""The loop of a canvas as a GPU would run it, on the test bed: CUDA kernels for every operator and for the condition,
and a stand-in for the captured graph. Prints what differs from the same puzzles one by one, as JSON.

python tests/loop_on_kernels.py 3
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

import dgemma_ext as dg
from adapter_folders import SETTINGS, random_tensors
from dgemma_ext import _C, demo
from dgemma_ext.engine.loop import LOOPS
from dgemma_ext.engine.runner import EagerRunner
from dgemma_ext.model import MatmulMode, PrefillChunk
from solve_puzzles import SEED, own_memory

CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Step(ctypes.Structure):
    """The stand-in for a captured graph: tests/sim/device/graph.h."""

    _fields_ = [("run", CALLBACK), ("context", ctypes.c_void_p)]


class HostGraphRunner(EagerRunner):
    """Like cuda_graphs.CudaGraphRunner: the kernel checks the loop's condition; Python reads no flag."""

    def __init__(self, *operands: Any) -> None:
        super().__init__(*operands)
        self.exceptions: list[BaseException] = []
        self._graph = Step(CALLBACK(self._run), None)
        self._steps_left = torch.zeros(1, dtype=torch.int32)
        active, slot = self._batch.state.active, self._batch.slot
        pointers = (active.data_ptr(), slot.data_ptr(), self._batch.rows, self._steps_left.data_ptr())
        self._loop = _C.GraphLoop(ctypes.addressof(self._graph), *pointers)

    def _run(self, _context: int | None) -> None:
        try:
            self.step()
        except BaseException as error:  # exceptions cannot pass through C
            self.exceptions.append(error)

    def run_until_finished(self, max_steps: int) -> None:
        self._steps_left.fill_(max_steps)
        self._loop.launch(0)
        if self.exceptions:
            raise self.exceptions[0]


def main(count: int) -> None:
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")
    for record in (model.weights, *model.weights.layers):
        own_memory(record)
    puzzles = [demo.draw(6, SEED, index) for index in range(count)]
    chats: list[Any] = [[{"role": "user", "content": puzzle.text}] for puzzle in puzzles]
    length = model.config.canvas_length
    # The first canvas ends when it is stable, the others at caps of 4, 6 ... steps: some steps finish none.
    samplers = [dg.SamplerConfig(max_denoising_steps=20)]
    samplers += [dg.SamplerConfig(max_denoising_steps=2 + 2 * n, confidence_threshold=0.0) for n in range(1, count)]
    # One of them with a grammar and two with adapters, which the steps of the others leave alone.
    grammars = [dg.Regex("[1-6]{36}") if n == 1 else None for n in range(count)]
    adapters = [f"of {n}" if n > 0 else None for n in range(count)]
    for n, name in enumerate(adapters):
        if name is not None:
            tensors = random_tensors(model.config, n, rank=2 + n, scale=0.1)
            settings = SETTINGS | {"r": 2 + n, "lora_alpha": 2 * (2 + n)}
            model.load_adapter(name, dg.Adapter.from_tensors(settings, tensors, model.config))
    own: list[dict[str, Any]] = [
        {"grammar": grammar, "adapter": adapter} for grammar, adapter in zip(grammars, adapters, strict=True)
    ]
    alone: list[Any] = [
        model.generate(chat, length, samplers[seed], seed, **own[seed]) for seed, chat in enumerate(chats)
    ]
    # A GPU's: one product for the rows of all canvases, and each canvas's factors by an index on the device.
    model.network.options.matmul = MatmulMode.BATCHED
    found: dict[str, Any] = {"steps": [list(output.denoising_steps) for output in alone]}
    original = EagerRunner.step
    for driver in LOOPS:
        steps, runs = [], 0

        def counted(runner: EagerRunner, chunks: Sequence[PrefillChunk] = (), steps: list[int] = steps) -> None:
            steps.append(1)
            original(runner, chunks)

        EagerRunner.step = counted  # type: ignore[method-assign]
        scheduler = dg.Scheduler(model, count, 200, batched=True, driver=driver, make_runner=HostGraphRunner)
        requests = [
            scheduler.submit(chat, length, samplers[seed], seed, **own[seed]) for seed, chat in enumerate(chats)
        ]
        while not scheduler.idle:
            runs += 1
            assert scheduler.finish_canvas(), "a loop ends when a canvas is finished"
        different = [r.number for r, one in zip(requests, alone, strict=True) if r.output != one]
        found[driver] = {"different": different, "steps": len(steps), "runs": runs}
        if driver == "graph":
            scheduler.submit(chats[0], length, samplers[-1])
            scheduler.step()
            del steps[:]
            scheduler._groups[length].runner().run_until_finished(3)
            found["until 3"] = len(steps)
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(int(sys.argv[1]))
