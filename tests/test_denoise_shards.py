"""merge_vocabulary_shards: the statistics and the draws of a vocabulary in shards are those of the whole."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from denoise_cases import (
    DTYPES,
    FORMS,
    NAN,
    RAW_ERRORS,
    Case,
    bits,
    draws,
    make_case,
    softmax_statistics,
    use,
)
from dgemma_ext.ops import denoise

# Shards of a vocabulary of 1,000 ids: whole tiles; words of a mask; one of a single word at the end; one by itself.
CUTS = [(0, 512, 1000), (0, 96, 608, 640, 1000), (0, 992, 1000), (0, 1000)]


def shard_of(case: Case, begin: int, end: int) -> tuple[Case, Tensor]:
    """A shard's logits with its own part of the masks, and which positions have an id there."""
    part = Case(case.logits[..., begin:end].contiguous(), case.softcap, case.temperature, case.active)
    mask = case.mask[..., begin:end]
    nonempty = mask.any(-1)
    if case.allowed is not None:
        ids = [[v for v in range(end - begin) if row[v]] or [0] for row in mask.flatten(0, 1).tolist()]
        part.allowed = denoise.pack_allowed(ids, end - begin)
        part.allowed_row = torch.arange(len(ids), dtype=torch.int32).view(mask.shape[:2])
    return part, nonempty


def of_shards(case: Case, cuts: tuple[int, ...], module: Any) -> tuple[list[Case], dict[str, Tensor]]:
    """The shards, and what the operator is told of them."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("best", "argmax", "entropy", "row_max", "row_sum")}
    parts, nonempty = [], []
    for begin, end in itertools.pairwise(cuts):
        part, some = shard_of(case, begin, end)
        statistics = denoise.VocabularyStatistics(*module.vocabulary_statistics(**part.logits_params))
        best = part.logits.gather(-1, statistics.argmax.long()[..., None])[..., 0].float()
        values = (best, statistics.argmax + begin, *statistics[1:4])
        for column, value in zip(found.values(), values, strict=True):
            column.append(value)
        parts.append(part)
        nonempty.append(some)
    return parts, {**{name: torch.stack(column) for name, column in found.items()}, "nonempty": torch.stack(nonempty)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cuts", CUTS)
def test_merged_shards_are_the_whole(
    cuts: tuple[int, ...], masked: bool, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = use(form, monkeypatch)
    case = make_case(dtype, masked=masked)
    drawing = draws(case.logits.shape[0])
    whole = denoise.VocabularyStatistics(*module.vocabulary_statistics(**case.logits_params))
    token = module.sample(**case.logits_params, **softmax_statistics(whole), **drawing, uniforms=None)
    parts, told = of_shards(case, cuts, module)
    shares, tokens = torch.zeros(case.logits.shape[:2]), torch.full_like(token, -1)
    for rank, (part, begin) in enumerate(zip(parts, cuts, strict=False)):
        merged = denoise.MergedShards(*module.merge_vocabulary_shards(**told, rank=rank, **drawing))
        assert torch.equal(merged.argmax, whole.argmax)
        assert torch.equal(merged.row_max, whole.row_max)
        # Masses in fp32, and the exponential that brings a tile to its row's maximum.
        torch.testing.assert_close(merged.row_sum, whole.row_sum, rtol=1e-6, atol=0)
        torch.testing.assert_close(merged.entropy, whole.entropy, rtol=2e-6, atol=2e-6)
        shares += merged.share
        own = module.vocabulary_statistics(**part.logits_params)
        of_rank = module.sample(**part.logits_params, **softmax_statistics(own), **drawing, uniforms=merged.own_uniform)
        tokens = torch.where(merged.owner == rank, of_rank + begin, tokens)
    assert torch.equal(tokens, token)
    torch.testing.assert_close(shares, torch.ones_like(shares), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_uniforms_at_the_ends_and_at_a_boundary(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards of the same mass: half of the uniforms is each one's, the boundary itself the second's."""
    module = use(form, monkeypatch)
    half = torch.zeros(2, 1, 5)
    uniforms = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0 - 2.0**-53]], dtype=torch.float64)
    told = {"best": half, "argmax": half.int(), "entropy": half, "row_max": half, "row_sum": half.double() + 3.0}
    inside = []
    for rank in (0, 1):
        merged = denoise.MergedShards(*module.merge_vocabulary_shards(**told, rank=rank, **draws(1), uniforms=uniforms))
        assert merged.owner.tolist() == [[0, 0, 1, 1, 1]]
        inside.append(merged.own_uniform[0].tolist())
    assert inside[0] == [0.0, 0.5, 0.0, 0.0, 0.0]
    assert inside[1] == pytest.approx([0.0, 0.0, 0.0, 0.5, 1.0], abs=1e-15)
    assert max(map(max, inside)) < 1.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("broken", [NAN, math.inf])
def test_what_is_empty_is_not_read_and_nan_spreads(broken: float, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = use(form, monkeypatch)
    shape = (3, 1, 3)
    nonempty = torch.tensor([[[False, True, False]], [[True, True, False]], [[True, True, False]]])
    values = {name: torch.where(nonempty, 1.0, NAN) for name in ("best", "entropy", "row_max")}
    values["best"][2, 0, 0] = 2.0  # the last shard's is greater at the first position, the second's elsewhere equal
    row_sum = torch.where(nonempty, 4.0, NAN).double()
    row_sum[1, 0, 1] = broken
    argmax = torch.arange(3, dtype=torch.int32)[:, None, None].expand(shape).contiguous() * 10
    merged = denoise.MergedShards(
        *module.merge_vocabulary_shards(**values, argmax=argmax, row_sum=row_sum, rank=2, **draws(1), nonempty=nonempty)
    )
    assert merged.argmax.tolist() == [[20, 0, 0]]
    assert merged.entropy[0, 0] == pytest.approx(math.log(8.0) - math.log(4.0) + 1.0)  # two alike: log 2 more than each
    assert merged.row_sum[0, 0] == pytest.approx(8.0)
    assert merged.share.tolist() == [[0.5, 0.0, 0.0]]
    assert merged.entropy.isnan().tolist() == merged.row_sum.isnan().tolist() == [[False, True, True]]
    assert merged.owner[0, 1:].tolist() == [0, 0]
    assert merged.own_uniform[0, 1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("form", FORMS)
def test_requests_that_are_not_active_stay_as_they_are(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = use(form, monkeypatch)
    case = make_case(torch.float32)
    _, told = of_shards(case, CUTS[0], denoise)
    shape, active = case.logits.shape[:2], torch.tensor([False, True])
    before = denoise.merge_vocabulary_shards(**told, rank=0, **draws(2))
    if form == "plain":
        into = {name: torch.full(shape, 7).to(value.dtype) for name, value in before._asdict().items()}
        names = {name: f"merged_{name}" for name in ("argmax", "entropy", "row_max", "row_sum")}
        operands = (*(told[name] for name in ("best", "argmax", "entropy", "row_max", "row_sum")), 0)
        operands = (*operands, *draws(2).values(), told["nonempty"], active, None)
        module.merge_vocabulary_shards_out(*operands, **{names.get(name, name): value for name, value in into.items()})
        out = denoise.MergedShards(**into)
    else:
        out = denoise.MergedShards(*(torch.full(shape, 7).to(value.dtype) for value in before))
        denoise.merge_vocabulary_shards(**told, rank=0, **draws(2), active=active, out=out)
    for value, whole in zip(out, before, strict=True):
        assert bool((value[0] == 7).all())
        if form != "plain":
            assert bits(value[1]) == bits(whole[1])


def test_a_rank_that_there_is_not_is_refused() -> None:
    _, told = of_shards(make_case(torch.float32), CUTS[0], denoise)
    with pytest.raises(RAW_ERRORS, match=r"rank: got 2, wants 0 to 1"):
        denoise.merge_vocabulary_shards(**told, rank=2, **draws(2))
