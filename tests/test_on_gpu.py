"""The copies that on_gpu.py makes, with the CPU in the GPU's place."""

from __future__ import annotations

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
