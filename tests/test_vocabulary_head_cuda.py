"""The CUDA kernels of the vocabulary head, run on the host by the test bed in several orders; their plan walked."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bounds import assert_close
from denoise_cases import NAN, Case, bits, make_case
from denoise_library import OK, SEEDS, Cuda, Head, Poisoned, library, machine, make_statistics, sizes, statistics_of
from denoise_library import with_nan_behind as guarded
from sim.build import SUPPORTED
from test_denoise_statistics import assert_statistics

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")

BF16 = torch.bfloat16
PARTS = ("argmax", "entropy", "row_max", "row_sum", "tile_max", "tile_sum")


@dataclass
class Result:
    raw: Tensor
    parts: tuple[Tensor, ...]

    def bits(self) -> list[list[int]]:
        return [bits(tensor) for tensor in (self.raw, *self.parts)]

    def request(self, b: int) -> list[list[int]]:
        return [bits(tensor[b]) for tensor in (self.raw, *self.parts)]


def run(case: Case, hidden: Tensor, embedding: Tensor, seed: int, **gpu: int) -> Result:
    poisoned, cuda = Poisoned(), Cuda()
    statistics, parts = make_statistics(case, poisoned)
    raw = poisoned.tensor(tuple(case.logits.shape), BF16)
    op = Head(statistics, hidden.shape[-1], hidden.data_ptr(), embedding.data_ptr(), raw.data_ptr())
    op.statistics.logits.raw = None
    with machine(seed, **gpu):
        status = library().dgemma_cuda_vocabulary_head(ctypes.byref(op), ctypes.byref(cuda))
    assert status == OK, cuda.message.decode()
    poisoned.assert_nothing_written_behind()
    return Result(raw, parts)


def make_operands(case: Case, hidden_size: int) -> tuple[Tensor, Tensor]:
    batch, length, vocabulary = case.logits.shape
    hidden = torch.randn(batch, length, hidden_size).to(BF16)
    return guarded(hidden), guarded((torch.randn(vocabulary, hidden_size) * (4 / hidden_size**0.5)).to(BF16))


# batch, length, vocabulary, hidden size; whether rows have allowed ids.
CASES = [
    ((1, 1, 129, 64), False),  # the cluster's second block has one entry
    ((3, 1, 128, 8), False),  # and nothing
    ((2, 24, 1000, 136), True),
    ((1, 64, 384, 64), False),
    ((2, 65, 257, 72), True),  # a row tile of 128; rows that begin at odd addresses
    ((1, 128, 1300, 200), False),  # the ring goes round in the middle of a tile
    ((1, 130, 402, 96), True),  # pairs of entries
    ((1, 256, 1290, 128), False),
    ((2, 300, 260, 64), True),  # two row tiles of 256, the second short
    ((1, 7, 300, 2816), False),  # the model's depth
]


@pytest.mark.parametrize(("size", "masked"), CASES, ids=str)
def test_kernel_is_right(size: tuple[int, int, int, int], masked: bool) -> None:
    batch, length, vocabulary, hidden_size = size
    case = make_case(BF16, batch=batch, length=length, vocabulary=vocabulary, masked=masked)
    hidden, embedding = make_operands(case, hidden_size)
    results = [run(case, hidden, embedding, seed) for seed in SEEDS]
    exact = hidden.double() @ embedding.double().T
    assert_close(results[0].raw, exact, BF16, functional.linear(hidden, embedding))
    off = (results[0].raw.double() - exact).abs() > exact.abs() * 2.0**-8 + 1e-4
    assert not bool(off.any()), "rounded more than once"
    stored = replace(case, logits=torch.where(case.mask, results[0].raw, NAN))
    assert_statistics(stored, results[0].parts)
    for mine, its in zip(results[0].parts, statistics_of(stored), strict=True):
        assert bits(mine) == bits(its), "not what the stored logits give"
    assert results[1].bits() == results[0].bits() == results[2].bits()


@pytest.mark.parametrize("multiprocessors", [1, 4, 7])
def test_any_number_of_blocks_gives_the_same_bits(multiprocessors: int) -> None:
    case = make_case(BF16, batch=2, length=9, vocabulary=1100)
    hidden, embedding = make_operands(case, 72)
    wanted = run(case, hidden, embedding, 1).bits()
    assert run(case, hidden, embedding, 2, multiprocessors=multiprocessors).bits() == wanted


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("active", [[True, False, True], [False, False, True], [False, False, False]], ids=str)
def test_inactive_requests_are_neither_read_nor_written(active: list[bool], seed: int) -> None:
    case = replace(make_case(BF16, batch=3, length=70, vocabulary=400), active=torch.tensor(active))
    hidden, embedding = make_operands(case, 64)
    for b in range(3):
        if not active[b]:
            hidden[b], case.temperature[b] = NAN, NAN
    result = run(case, hidden, embedding, seed)
    for b in range(3):
        alone = run(case.request(b), hidden[b : b + 1].contiguous(), embedding, seed) if active[b] else None
        for index, tensor in enumerate((result.raw, *result.parts)):
            if alone is not None:
                assert bits((alone.raw, *alone.parts)[index][0]) == bits(tensor[b]), "not as if it were alone"
            else:
                assert bool((tensor[b].contiguous().view(torch.uint8) == 0xFF).all()), "written"


def test_a_hidden_state_that_is_not_finite_ends_its_row_alone() -> None:
    case = make_case(BF16, batch=1, length=40, vocabulary=300)
    hidden, embedding = make_operands(case, 64)
    hidden[0, 33, 5] = NAN
    result = run(case, hidden, embedding, 1)
    finite = torch.arange(40) != 33
    assert torch.equal(torch.isfinite(result.parts[PARTS.index("entropy")][0]), finite)
    assert torch.equal(torch.isfinite(result.raw[0]).all(-1), finite)


@dataclass
class Plan:
    row_tile: int
    row_tiles: int
    tile_pairs: int
    blocks: int
    text: str


def plan_of(batch: int, length: int, vocabulary: int, multiprocessors: int = 132) -> Plan:
    numbers, text = (ctypes.c_int64 * 4)(), ctypes.create_string_buffer(400)
    op = sizes(batch, length, vocabulary)
    library().head_plan(ctypes.byref(op), multiprocessors, numbers, text, ctypes.c_size_t(400))
    return Plan(*numbers, text.value.decode())


@pytest.mark.parametrize("active", [1, 2, 8])
@pytest.mark.parametrize(("length", "vocabulary"), [(1, 128), (256, 262144), (257, 262145), (4096, 1000)])
def test_units_cover_the_product_once(length: int, vocabulary: int, active: int) -> None:
    plan, op, count = plan_of(8, length, vocabulary), sizes(8, length, vocabulary), ctypes.c_int64()
    library().head_units(ctypes.byref(op), active, None, ctypes.byref(count))
    units = np.full((count.value + 1, 3), -7, dtype=np.int32)
    library().head_units(ctypes.byref(op), active, units.ctypes.data_as(ctypes.c_void_p), ctypes.byref(count))
    assert (units[-1] == -7).all()
    covered = np.zeros((plan.tile_pairs, active, plan.row_tiles), dtype=np.int64)
    np.add.at(covered, tuple(units[:-1].T), 1)
    assert (covered == 1).all()
    assert plan.tile_pairs * 256 >= vocabulary > (plan.tile_pairs - 1) * 256
    assert plan.row_tiles * plan.row_tile >= length > (plan.row_tiles - 1) * plan.row_tile


def test_plan_of_a_canvas() -> None:
    assert plan_of(1, 256, 262144).text == (
        "head: 132 blocks of 384 threads, in pairs; 1024 pairs of vocabulary tiles by 1 tiles of 256 rows a request\n"
    )
    assert [plan_of(1, length, 262144).row_tile for length in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 256]
    assert plan_of(1, 1, 129, 3).blocks == plan_of(1, 1, 129, 1).blocks == 2
