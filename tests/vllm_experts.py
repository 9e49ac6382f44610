"""Records what the experts inside vLLM are given and what comes of it; for the processes of tests/vllm_probe.py.

With TEST_VLLM_EXPERTS set to a folder, the first calls of each model are saved there as MODEL.PROCESS.pt: a list of
calls, each with input, ids, weights, expert map and output, and the weights' tensors by the names of their fields. A
worker that is a process of its own imports this module for `Worker`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Three layers, twice.
CALLS = 6
RECORDS, MODEL = "TEST_VLLM_EXPERTS", "TEST_VLLM_MODEL"


class Worker:
    """What a worker is given beside its own methods: none."""


def record(folder: Path) -> None:
    from dgemma_ext.integrations.vllm import experts

    inner, recorded = experts.experts_product, dict[str, list[dict[str, Any]]]()

    def product(
        hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Any, down: Any, places: Any, out: Tensor
    ) -> None:
        inner(hidden, ids, weights, gate_up, down, places, out)
        calls = recorded.setdefault(os.environ.get(MODEL, "model"), [])
        # The first of vLLM's passes, which measures memory, has zeros for input.
        if len(calls) < CALLS and hidden.abs().sum() > 0:
            given = {"hidden": hidden, "ids": ids, "weights": weights, "places": places, "out": out}
            call: dict[str, Any] = {name: None if one is None else one.clone() for name, one in given.items()}
            calls.append({**call, "gate_up": parts_of(gate_up), "down": parts_of(down)})
            torch.save(calls, folder / f"{os.environ.get(MODEL, 'model')}.{os.getpid()}.pt")

    experts.experts_product = product


def parts_of(weight: Any) -> dict[str, Any]:
    if isinstance(weight, Tensor):
        return {"": weight.detach()}
    more = {"divides": weight.divides} if weight.name == "nvfp4" else {}
    return {"name": weight.name, **weight.tensors(), **more}


if RECORDS in os.environ:
    record(Path(os.environ[RECORDS]))
