"""Runs the operators' own tests with every operator on the CUDA kernels, on the host.

Each run plays another GPU and draws the order of threads, copies and products from another seed. tests/backend.py
lists what a backend tests.
"""

from __future__ import annotations

import pytest

from cuda_tools import OPERATOR_TESTS
from sim.build import SUPPORTED
from sim.extension import run_tests_on_kernels

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")


@pytest.mark.parametrize(("compute_capability", "seed"), [(80, 1), (90, 2), (120, 3)])
def test_operators_on_the_kernels(compute_capability: int, seed: int) -> None:
    """With 9.0, which has most kernels, bad input too."""
    refusals = ["test_cuda_refusals.py", "test_c_tensors.py"] if compute_capability == 90 else []
    run_tests_on_kernels(
        *(f"tests/{name}" for name in (*OPERATOR_TESTS, *refusals)), compute_capability=compute_capability, seed=seed
    )


def test_one_thread_chooses_the_tile_of_a_draw() -> None:
    """Uniforms at the ends of the unit interval: running totals are not monotonic there, and several threads could."""
    run_tests_on_kernels("tests/test_denoise_sampling.py", "-k", "given_uniforms and 1000", seed=2, watch=True)
