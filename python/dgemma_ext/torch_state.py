"""What a program has set in torch, kept away from this package's computations.

The results of a model do not depend on autocast, grad mode, inference mode, the default device or the default dtype of
the program around it. The last two are kept away by naming device and dtype wherever a tensor is made; the others by
`own_torch_state`, in which every computation runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Whether this thread has computed on several threads, and whether the process was forked by it since.
_thread = threading.local()


@contextmanager
def own_torch_state() -> Iterator[None]:
    """Inside the block: no autocast, no gradients, no inference mode (its tensors could not be written outside).

    Raises RuntimeError where nothing can be computed: in a process that was forked by a thread that had computed, and
    in a FakeTensorMode, whose tensors have no values.
    """
    _check_process()
    _check_modes()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def in_own_torch_state(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function with its calls inside `own_torch_state`."""

    @wraps(function)
    def call(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
        with own_torch_state():
            return function(*arguments, **keywords)

    return call


def _check_process() -> None:
    if torch.get_num_threads() == 1:
        return
    if getattr(_thread, "forked", False):
        raise RuntimeError(
            "this process was forked by a thread that had computed, and OpenMP's threads, which it would wait for, do "
            'not survive a fork; start processes with the method "spawn", fork before a model is loaded, or call '
            "torch.set_num_threads(1) here"
        )
    _thread.computed = True


def _check_modes() -> None:
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise RuntimeError("a FakeTensorMode is active, and its tensors have no values to compute with")


def _after_fork() -> None:
    _thread.forked = getattr(_thread, "computed", False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
