"""Which implementation of the operators a run of the suite tests.

DGEMMA_TEST_BACKEND in the environment: "cpu", the default; "sim", the CUDA kernels on the host (test_sim_operators.py
starts such runs); "cuda", the kernels on a GPU (`make gpu-check`), on copies of the tests' tensors (on_gpu.py). The
tests of an operator are the same for all of them. DGEMMA_TEST_GPU: the compute capability of the GPU that "sim" plays.
"""

from __future__ import annotations

import os

import pytest
import torch

from dgemma_ext import _C

BACKEND = os.environ.get("DGEMMA_TEST_BACKEND", "cpu")
# No kernel on a GPU takes float32.
DTYPES = [torch.float32, torch.bfloat16] if BACKEND == "cpu" else [torch.bfloat16]
# The instruction sets of this machine; the other backends have one form.
VARIANTS = _C.cpu_variants() if BACKEND == "cpu" else [BACKEND]
if "DGEMMA_TEST_MACHINE" in os.environ:  # the C library of another machine (cross.py)
    VARIANTS = ["scalar"]
# The form in torch, which is compared with the kernels, is tested as well.
FORMS = [*VARIANTS, "plain"] if BACKEND == "cpu" else VARIANTS


def _compute_capability() -> int:
    if BACKEND == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    return int(os.environ.get("DGEMMA_TEST_GPU", "90"))


# The compute capability of the GPU, e.g. 90 for 9.0; None on the CPU.
COMPUTE_CAPABILITY = _compute_capability()

# Marks tests of what only the CPU does: checking values before it computes, and taking any size and type.
cpu_only = pytest.mark.skipif(BACKEND != "cpu", reason="of the CPU's operators alone")
# Marks tests of many repetitions, which would take minutes on the test bed.
not_on_test_bed = pytest.mark.skipif(BACKEND == "sim", reason="too long on the test bed; run on the CPU and on a GPU")


def skip_if_on_device(what: str, of_values: set[str]) -> None:
    """Skips a case of bad input that is only found by reading values, which the host cannot do for a GPU."""
    if BACKEND != "cpu" and what in of_values:
        pytest.skip("values on the device are not looked at")
