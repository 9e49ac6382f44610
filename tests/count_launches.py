"""Counts the launches of a denoising step with 30 layers on a GPU: our kernels, counted as the test bed runs them, and
torch's operators that are one launch each. Prints them for one request and for a batch of four.

tests/test_sim_loop.py runs it on the test bed, whose process has the counter of launches.
"""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dgemma_ext as dg
from adapter_folders import SETTINGS, random_tensors
from automaton_cases import random_automaton
from dgemma_ext import _C
from dgemma_ext.model import MatmulMode
from dgemma_ext.sampling import SamplerConfig, begin_canvas, denoising_step, make_canvas_batch, make_step_buffers
from dgemma_ext.sampling.constraint import Constraint
from models import random_model

LAYERS = ("sliding_attention",) * 5 + ("full_attention",)
# No launches on a GPU: views that the schema does not call views, allocations, and the parts of our own operators.
FREE = {"_unsafe_view", "empty", "new_empty", "empty_like", "detach", "_reshape_alias"}
# Operators that make the host wait for the device.
WAITS = {"_local_scalar_dense", "item"}


class Counted(TorchDispatchMode):
    """Counts of torch's operators by name, and of our kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.torchs: Counter[str] = Counter()
        self.waits = 0
        self._machine = ctypes.CDLL(_C.__file__)
        self._machine.sim_next_seed.restype = ctypes.c_uint64
        self._before = self._machine.sim_next_seed()

    @property
    def kernels(self) -> int:
        return int(self._machine.sim_next_seed()) - self._before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, _, short = func._schema.name.partition("::")
        if short in WAITS:
            self.waits += 1
        elif library == "aten" and not func.is_view and short not in FREE:
            self.torchs[short] += 1
        return func(*args, **(kwargs or {}))


def counts(*operands: Any) -> dict[str, Any]:
    """Of a denoising step."""
    with Counted() as counted:
        denoising_step(*operands)
    return {
        "kernels": counted.kernels,
        "torch": sum(counted.torchs.values()),
        "waits": counted.waits,
        "by name": dict(counted.torchs.most_common()),
    }


def small_model(weights: str) -> dg.DiffusionGemma:
    sizes: dict[str, Any] = {"hidden": 64, "head_dim": 32, "global_head_dim": 64, "window": 24, "canvas": 16}
    model = random_model(torch.bfloat16, weights, layers=LAYERS * 5, **sizes)
    model.network.options.matmul = MatmulMode.BATCHED  # a GPU's
    return model


def begun(model: dg.DiffusionGemma, rows: int) -> tuple[Any, ...]:
    """A batch of canvases over prefixes of their own."""
    sampler = SamplerConfig(confidence_threshold=0.0).resolve(model.defaults, 16)
    network = model.network
    cache, batch = model.new_cache(rows, 64), make_canvas_batch(network, rows, 16)
    buffers = make_step_buffers(network, rows, 16)
    for slot in range(rows):
        prefix = 9 + slot
        model.encode(torch.arange(prefix)[None], cache, slots=[slot])
        begin_canvas(network, batch, slot, sampler, seed=slot, index=0)
        batch.place(slot, slot, prefix, network.rotary_tables(torch.arange(prefix, prefix + 16)))
    return network, cache, batch, buffers


def main() -> None:
    model = small_model("auto")
    found = {}
    for rows in (1, 4):
        network, cache, batch, buffers = begun(model, rows)
        for step in range(2):
            found[f"rows {rows}, step {step + 1}"] = counts(network, cache, batch, buffers)
    one = random_automaton(np.random.default_rng(1), model.config.vocab_size)
    batch.constraints.place(2, Constraint(one, 0, 3))  # type: ignore[arg-type]
    batch.constraints.update()
    found["rows 4, with a grammar"] = counts(network, cache, batch, buffers)
    batch.constraints.clear(2)
    tensors = random_tensors(model.config, 1)
    adapter = model.load_adapter("one", dg.Adapter.from_tensors(SETTINGS, tensors, model.config))
    batch.adapters.place(1, adapter)
    batch.adapters.update()
    found["rows 4, with an adapter"] = counts(network, cache, batch, buffers)
    found["rows 4, step 1, in int8"] = counts(*begun(small_model("int8"), 4))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
