"""CUDA kernels on the host: two example kernels are right in any order of threads, and wrong with a planted mistake.

The test bed is tests/sim; test_sim_faults.py tests its reports of misuse, test_sim_conformance.py its instructions.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sim.build import SIM, SUPPORTED, sim_library, sim_program

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")

KERNELS = [SIM / "kernels" / f"{architecture}_bf16_tile_product.cu" for architecture in ("sm90", "sm80")]
SEEDS = range(1, 7)

Bits = NDArray[np.uint16]


class Mistake(IntEnum):
    """As in tests/sim/kernels/mistakes.h."""

    NONE = 0
    EARLY_RELEASE = 1
    NO_RELEASE = 2
    EARLY_READ = 3
    NO_COPY_WAIT = 4
    NO_BLOCK_BARRIER = 5


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return sim_library("tile_products", KERNELS)


def to_bfloat16(x: NDArray[np.float64]) -> Bits:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float64(bits: Bits) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


class Product:
    """One product by one kernel: `message` is None or the test bed's report, `error` is relative to float64."""

    def __init__(
        self,
        library: ctypes.CDLL,
        architecture: str,
        rows: int,
        tokens: int,
        depth: int,
        seed: int,
        mistake: Mistake = Mistake.NONE,
        blocks: int = 2,
    ) -> None:
        generator = np.random.default_rng(rows + tokens + depth)
        weights = to_bfloat16(generator.standard_normal((rows, depth)))
        inputs = to_bfloat16(generator.standard_normal((tokens, depth)))
        out = np.full((tokens, rows), np.nan, np.float32)
        kernel = getattr(library, f"{architecture}_bf16_tile_product")
        kernel.restype = ctypes.c_char_p
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (weights, inputs, out)]
        sizes = [rows, tokens, depth] + ([blocks] if architecture == "sm90" else [])
        library.sim_set_seed(ctypes.c_uint64(seed))
        message = kernel(*pointers, *sizes, int(mistake), None)
        self.message: str | None = message.decode() if message else None
        wanted = to_float64(inputs) @ to_float64(weights).T
        self.error = float(np.linalg.norm(out - wanted) / np.linalg.norm(wanted))
        counts = (ctypes.c_uint64 * 6)()
        library.sim_statistics(counts)
        self.bulk_bytes_read, self.bulk_bytes_written, self.small_copy_bytes_read, self.products = counts[2:]

    @property
    def right(self) -> bool:
        # A sum of 1,408 products in float is off by about 3e-7.
        return self.message is None and self.error < 2e-6


# A whole expert's rows and depth; rows, tokens and depth that no tile divides; one stage; one token.
SIZES = [(704, 16, 1408), (200, 27, 456), (64, 8, 64), (8, 1, 8)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rows", "tokens", "depth"), SIZES)
def test_wgmma_product_is_right_in_any_order(
    library: ctypes.CDLL, rows: int, tokens: int, depth: int, seed: int
) -> None:
    product = Product(library, "sm90", rows, tokens, depth, seed)
    assert product.message is None
    assert product.right, product.error


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rows", "tokens", "depth"), [(rows, min(tokens, 16), depth) for rows, tokens, depth in SIZES])
def test_mma_product_is_right_in_any_order(library: ctypes.CDLL, rows: int, tokens: int, depth: int, seed: int) -> None:
    product = Product(library, "sm80", rows, tokens, depth, seed)
    assert product.message is None
    assert product.right, product.error


def test_every_weight_is_read_once(library: ctypes.CDLL) -> None:
    rows, tokens, depth = 320, 16, 192
    product = Product(library, "sm90", rows, tokens, depth, seed=1)
    assert product.bulk_bytes_read == 2 * depth * (rows + tokens * rows // 64)
    assert product.products == rows * tokens * depth
    product = Product(library, "sm80", rows, tokens, depth, seed=1)
    assert product.small_copy_bytes_read == 2 * depth * (rows + tokens * rows // 64)


@pytest.mark.parametrize(
    ("architecture", "mistake"),
    [
        ("sm90", Mistake.EARLY_RELEASE),
        ("sm90", Mistake.EARLY_READ),
        ("sm80", Mistake.NO_COPY_WAIT),
        ("sm80", Mistake.NO_BLOCK_BARRIER),
    ],
)
def test_a_planted_race_gives_wrong_numbers(library: ctypes.CDLL, architecture: str, mistake: Mistake) -> None:
    wrong = [seed for seed in SEEDS if not Product(library, architecture, 200, 13, 640, seed, mistake).right]
    # A kernel's own test runs at least three orders.
    assert len(wrong) >= 4, f"only the orders of seeds {wrong} show it"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_planted_deadlock_is_reported(library: ctypes.CDLL, seed: int) -> None:
    product = Product(library, "sm90", 200, 13, 640, seed, Mistake.NO_RELEASE)
    assert product.message is not None
    assert re.match(r"kernel tile_product<.*>, deadlock: no thread can go on\n", product.message)
    # The report names what each waits for, and where: the producer for an empty stage, the warpgroup for a full one.
    assert (
        "which is in phase 0: 4 of 4 arrivals and 0 bytes are missing, at sm90_bf16_tile_product.cu:" in product.message
    )
    assert "threads 0-127: waits for parity 1 of the mbarrier at offset 40960" in product.message


def test_the_same_seed_gives_the_same_order(library: ctypes.CDLL) -> None:
    reports = {Product(library, "sm90", 200, 13, 640, seed, Mistake.EARLY_READ).message for seed in (3, 3, 3)}
    errors = {repr(Product(library, "sm80", 200, 13, 640, seed, Mistake.NO_BLOCK_BARRIER).error) for seed in (5, 5)}
    assert len(reports) == 1
    assert len(errors) == 1


@pytest.fixture(scope="module")
def sanitized_program() -> Path:
    return sim_program("small_case", [*KERNELS, SIM / "kernels" / "small_case.cu"], sanitize=True)


def test_sanitizers_find_nothing_in_a_small_case(sanitized_program: Path) -> None:
    result = subprocess.run([sanitized_program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "right\n", "")


@pytest.mark.parametrize(("array", "access"), [("short_output", "WRITE of size 4"), ("short_weights", "READ of size")])
def test_sanitizers_find_an_array_that_is_too_short(sanitized_program: Path, array: str, access: str) -> None:
    result = subprocess.run([sanitized_program, array], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert access in result.stderr
