"""The CUDA kernels of the soft embedding, run on the host by the test bed in several orders."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bounds import assert_close
from denoise_cases import NAN, Case, bits, make_case, softmax_statistics
from denoise_library import OK, SEEDS, Cuda, Poisoned, SoftEmbedding, describe, library, machine, statistics_of
from denoise_library import with_nan_behind as guarded
from dgemma_ext.profile.soft_tiles import listed_tiles
from sim.build import SUPPORTED
from test_denoise_soft_embedding import (
    TOLERANCE,
    assert_kept_at_the_bound,
    at_the_bound,
    exact,
    in_low_precision,
    make_embedding,
    peaked,
)

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")

BF16 = torch.bfloat16


def run(case: Case, how: dict[str, Any], seed: int, capability: int = 90) -> Tensor:
    """The output of a call into poison, in one of the machine's orders."""
    poisoned, cuda = Poisoned(), Cuda()
    _, _, row_max, row_sum, tile_max, tile_sum = statistics_of(case)
    embedding, pinned = guarded(how["embedding"]), how["pinned"]
    out = poisoned.tensor((*case.logits.shape[:2], embedding.shape[1]), BF16)
    op = SoftEmbedding(
        describe(case),
        *(tensor.data_ptr() for tensor in (row_max, row_sum, tile_max, tile_sum)),
        None if pinned is None else pinned.data_ptr(),
        embedding.shape[1],
        embedding.data_ptr(),
        how["embedding_scale"],
        how["tolerance"],
        how["max_embedding_norm"],
        out.data_ptr(),
    )
    op.workspace_bytes = library().dgemma_cuda_soft_embedding_workspace(ctypes.byref(op))
    workspace = poisoned.tensor((op.workspace_bytes,), torch.uint8)
    op.workspace = workspace.data_ptr()
    with machine(seed, capability):
        status = library().dgemma_cuda_soft_embedding(ctypes.byref(op), ctypes.byref(cuda))
    assert status == OK, cuda.message.decode()
    poisoned.assert_nothing_written_behind()
    return out


# batch, length, vocabulary, hidden size; whether rows have allowed ids.
CASES = [
    ((1, 1, 257, 96), False),  # fewer tiles than splits; the cluster's second block has no column
    ((2, 7, 1000, 136), True),
    ((1, 64, 700, 264), False),  # three column tiles, the last of them short
    ((2, 65, 513, 64), True),  # a row tile of 128
    ((1, 130, 900, 200), False),
    ((1, 256, 3500, 136), False),  # the ring goes round twice
    ((2, 300, 260, 72), True),  # two row tiles of 256, the second short
    ((1, 3, 20001, 136), False),  # the ring goes round many times
    ((1, 2, 300, 2816), False),  # the model's width
]


@pytest.mark.parametrize(("size", "masked"), CASES, ids=str)
def test_dense(size: tuple[int, int, int, int], masked: bool) -> None:
    batch, length, vocabulary, hidden_size = size
    case = make_case(BF16, batch=batch, length=length, vocabulary=vocabulary, masked=masked)
    how = make_embedding(case, hidden_size)
    results = [run(case, how, seed) for seed in SEEDS]
    assert_close(results[0], exact(case, how), BF16, in_low_precision(case, how))
    assert bits(results[1]) == bits(results[0]) == bits(results[2])


@pytest.mark.parametrize("vocabulary", [130, 257])
def test_flat_rows_count_nothing_past_the_vocabulary(vocabulary: int) -> None:
    """Every entry weighs the same, so one that is not there would show."""
    case = make_case(BF16, length=5, vocabulary=vocabulary, spread=0.01)
    how = make_embedding(case, 64)
    assert_close(run(case, how, 1), exact(case, how), BF16, in_low_precision(case, how))


@pytest.mark.parametrize("seed", SEEDS)
def test_tiles_that_no_row_needs_are_not_read(seed: int) -> None:
    case = peaked(BF16, spread=1.0, among=500, length=70)
    how = {**make_embedding(case, 136), "tolerance": TOLERANCE}
    wanted = exact(case, how)
    how["embedding"][512:] = NAN
    result = run(case, how, seed)
    assert bool(((result.double() - wanted).norm(dim=-1) <= 2.0**-7 * wanted.norm(dim=-1)).all())
    assert run(case, {**how, "tolerance": 0.0}, seed).isnan().all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_request_that_fails_the_bound_is_done_again_and_others_are_not(seed: int) -> None:
    """What carries the mass of request 1 cancels; request 0 is peaked as well, on another token."""
    case = peaked(BF16, vocabulary=2000, length=9, among=100)
    case.logits[0, :, 1500] = 60.0
    how = {**make_embedding(case, 64), "tolerance": TOLERANCE}
    how["embedding"][:100] = 0.0
    wanted = exact(case, how)
    result = run(case, how, seed)
    assert bool(((result.double() - wanted).norm(dim=-1) <= (TOLERANCE + 2.0**-8) * wanted.norm(dim=-1)).all())
    unchecked = run(case, {**how, "max_embedding_norm": 0.0}, seed)
    assert bits(unchecked[0]) == bits(result[0])
    assert bits(unchecked[1]) != bits(result[1])


def test_skipped_mass_at_the_bound() -> None:
    case, how = at_the_bound(0.25, 0.125)
    assert_kept_at_the_bound(run(case, how, 1), case, how)


@pytest.mark.parametrize(("temperature", "largest"), [(0.4, 11.5), (0.5, 13.0)])
def test_the_profile_counts_the_tiles_that_are_listed(temperature: float, largest: float) -> None:
    """A NaN in an unlisted tile's embeddings does not matter; one in any listed tile does, whatever its probability."""
    case = make_case(BF16, batch=1, length=3, vocabulary=4096, spread=2.5)
    case.logits[0, torch.arange(3), torch.tensor([7, 1500, 2900])] = largest
    case.temperature = torch.tensor([temperature])
    how = {**make_embedding(case, 64), "tolerance": 2.0**-7}
    named = {**softmax_statistics(statistics_of(case)), **how}
    listed = listed_tiles(named, BF16)[0].any(0)
    assert 3 < int(listed.sum()) < 20
    how["embedding"].view(32, 128, 64)[~listed] = NAN
    assert not run(case, how, 1).isnan().any()
    for tile in listed.nonzero().flatten().tolist()[::3]:
        how["embedding"][128 * tile + 77] = NAN
        assert run(case, how, 1).isnan().any()
        how["embedding"][128 * tile + 77] = 0.0


@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
def test_requests_alone_and_together_pinned_and_inactive(tolerance: float) -> None:
    case = make_case(BF16, batch=4, length=70, vocabulary=1500)
    case.logits[:, ::2, 1400] = 60.0
    case.active = torch.tensor([True, False, True, True])
    how = {**make_embedding(case, 136), "tolerance": tolerance, "pinned": torch.zeros(4, 70, dtype=torch.bool)}
    how["pinned"][2, 5] = True
    whole = replace(case, logits=case.logits.clone(), temperature=case.temperature.clone())
    whole.logits[1], whole.temperature[1] = NAN, NAN
    result = run(whole, how, 1)
    assert bool((result[1].contiguous().view(torch.uint8) == 0xFF).all()), "written"
    assert bool((result[2, 5] == 0).all())
    for b in (0, 2, 3):
        alone = run(case.request(b), {**how, "pinned": how["pinned"][b : b + 1].contiguous()}, 2)
        assert bits(alone[0]) == bits(result[b])


def test_the_paths_agree() -> None:
    """The same splits of the same list, summed in the same order."""
    case = make_case(BF16, batch=1, length=20, vocabulary=3000)
    how = make_embedding(case, 64)
    ours, theirs = (run(case, how, 1, capability) for capability in (90, 86))
    assert_close(ours, theirs.double(), BF16, in_low_precision(case, how))
