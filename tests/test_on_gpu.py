"""The forms of operators that on_gpu.py registers, tested with the CPU in place of a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import library

from on_gpu import copying


def test_results_and_written_arguments_come_back() -> None:
    with library._scoped_library("dgemma_copy_test", "DEF") as defined:
        defined.define("twice(Tensor x, float by, *, Tensor(a!) out) -> Tensor")
        seen = []

        def twice(x: torch.Tensor, by: float, *, out: torch.Tensor) -> torch.Tensor:
            seen.append((x, out))
            out.copy_(x * by)
            return out + 1

        defined.impl("twice", twice, "CPU")
        call = copying(torch.ops.dgemma_copy_test.twice.default, "cpu")
        x, out = torch.arange(3.0), torch.zeros(3)
        assert call(x, 2.0, out=out).tolist() == [1.0, 3.0, 5.0]
        assert out.tolist() == [0.0, 2.0, 4.0]
        assert seen[0][0] is not x
        assert seen[0][1] is not out


def test_every_operator_is_replaced_where_torch_refuses_to_by_default() -> None:
    """In torch 2.11 `Library.impl` refuses to replace a form that was registered in Python, unless it is told to."""
    program = """
import inspect, torch
from torch import library
impl = library.Library.impl
names = list(inspect.signature(impl).parameters)
parameter = inspect.signature(impl).parameters["allow_override"]
if parameter.kind is parameter.KEYWORD_ONLY:
    impl.__kwdefaults__["allow_override"] = False
else:
    defaults = list(impl.__defaults__)
    defaults[names.index("allow_override") - len(names)] = False
    impl.__defaults__ = tuple(defaults)
from on_gpu import run_operators_on
run_operators_on("cuda")
print(sum("on_gpu.py" in torch._C._dispatch_dump(name) for name in torch._C._dispatch_get_all_op_names()
          if name.startswith("dgemma::")))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    assert result.returncode == 0, result.stderr[-2000:]
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dgemma::")]
    assert int(result.stdout) == len(operators)
