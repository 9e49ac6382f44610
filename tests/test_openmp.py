"""The wait policy of torch's threads, as the OpenMP library says it has it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from dgemma_ext import openmp

LEFT = "import os; print(sorted(name for name in os.environ if name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))"


def spin_count(program: str, **environment: str) -> tuple[str, str]:
    """GNU OpenMP's number of rounds, and what the program prints."""
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**clean, "OMP_DISPLAY_ENV": "verbose", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("torch here has another OpenMP than GNU's")
    return found[1], done.stdout.strip()


def test_threads_soon_sleep_and_nothing_is_left_in_the_environment() -> None:
    assert spin_count(f"import dgemma_ext; {LEFT}") == (openmp.SPIN_COUNT, "[]")


@pytest.mark.parametrize(("setting", "count"), [("OMP_WAIT_POLICY=passive", "0"), ("GOMP_SPINCOUNT=77", "77")])
def test_the_users_own_setting_stays(setting: str, count: str) -> None:
    name, value = setting.split("=")
    assert spin_count(f"import dgemma_ext; {LEFT}", **{name: value}) == (count, f"['{name}']")


def test_torch_that_is_there_already_keeps_its_own() -> None:
    count, left = spin_count(f"import torch, dgemma_ext; {LEFT}")
    assert (int(count) > 10 * int(openmp.SPIN_COUNT), left) == (True, "[]")
