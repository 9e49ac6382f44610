"""soft_embedding on every instruction set of the machine, and its form in torch, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, library

from backend import BACKEND
from bounds import assert_close
from denoise_cases import DTYPES, FORMS, NAN, RAW_ERRORS, Case, bits, make_case, softmax_statistics, use
from dgemma_ext.ops import denoise
from dgemma_ext.ops.description import OPERATORS
from dgemma_ext.ops.plain import denoise as denoise_plain
from reference import denoise as reference

TOLERANCE = 2.0**-9


def make_embedding(case: Case, hidden: int = 96) -> dict[str, Any]:
    embedding = torch.randn(case.logits.shape[2], hidden).to(case.logits.dtype)
    norm = float(embedding.double().norm(dim=-1).max())
    return {
        "pinned": None,
        "embedding": embedding,
        "embedding_scale": 9.8,
        "tolerance": 0.0,
        "max_embedding_norm": norm,
    }


def soft(form: str, monkeypatch: pytest.MonkeyPatch, case: Case, how: dict[str, Any]) -> Tensor:
    module = use(form, monkeypatch)
    statistics = module.vocabulary_statistics(**case.logits_params)
    result: Tensor = module.soft_embedding(**case.logits_params, **softmax_statistics(statistics), **how)
    return result


def exact(case: Case, how: dict[str, Any]) -> Tensor:
    return reference.soft_embedding(
        case.logits, case.softcap, case.temperature, case.mask, how["embedding"], how["embedding_scale"]
    )


def in_low_precision(case: Case, how: dict[str, Any]) -> Tensor:
    """The same in the model's dtype, as transformers computes it."""
    nothing = torch.zeros(0)
    row_sum = torch.ones(case.logits.shape[:2])
    out = case.logits.new_zeros((*case.logits.shape[:2], how["embedding"].shape[1]))
    statistics = {"row_max": nothing, "row_sum": row_sum, "tile_max": nothing, "tile_sum": nothing}
    denoise_plain.soft_embedding_out(*in_order({**case.logits_params, **statistics, **how}), out=out)
    return out


def in_order(arguments: dict[str, Any]) -> list[Any]:
    """The arguments of the soft embedding as its form without names takes them."""
    return [arguments[argument.name] for argument in OPERATORS["soft_embedding"].arguments]


def peaked(
    dtype: torch.dtype, vocabulary: int = 4096, gap: float = 25.0, among: int | None = None, **changes: Any
) -> Case:
    """Every row is nearly certain of one token, with two more that matter, all below `among`."""
    case = make_case(dtype, vocabulary=vocabulary, **changes)
    batch, length, _ = case.logits.shape
    tokens = torch.randint(0, among or vocabulary, (batch, length, 3))
    case.logits.scatter_(-1, tokens, (gap + torch.tensor([4.0, 3.0, 2.5])).expand(tokens.shape).to(dtype))
    return case


# The last case takes three blocks of the CPU's probabilities (csrc/denoise/cpu/kernels.h), so both buffers are used
# again. On a GPU the hidden size must be a multiple of eight.
SIZES = [(257, 96), (1000, 64), (4096, 33), (5001, 130), (20001, 40)]
if BACKEND != "cpu":
    SIZES = [(vocabulary, hidden // 8 * 8) for vocabulary, hidden in SIZES]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("vocabulary", "hidden"), SIZES)
def test_dense(
    vocabulary: int, hidden: int, masked: bool, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(dtype, length=7, vocabulary=vocabulary, masked=masked)
    how = make_embedding(case, hidden)
    result = soft(form, monkeypatch, case, how)
    assert result.dtype == dtype
    assert_close(result, exact(case, how), dtype, in_low_precision(case, how))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.01, 4.0, 12.0])
def test_sparse_or_dense_within_the_tolerance(
    spread: float, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are flat, in between, and peaked, and a mix of them in one request."""
    case = make_case(dtype, vocabulary=4096, spread=spread)
    case.logits[:, ::3, 1234] = 60.0
    how = {**make_embedding(case), "tolerance": TOLERANCE}
    difference = (soft(form, monkeypatch, case, how).double() - exact(case, how)).norm(dim=-1)
    norms = exact(case, how).norm(dim=-1)
    # The tolerance comes on top of the rounding of the type, which dense results have too.
    rounding = 2.0 * (in_low_precision(case, how).double() - exact(case, how)).norm(dim=-1)
    assert bool((difference <= TOLERANCE * norms + rounding + 1e-6 * norms).all())


def at_the_bound(share: float, tolerance: float) -> tuple[Case, dict[str, Any]]:
    """Requests of one row whose skipped tiles have nearly all the mass that `share` of the tolerance lets them have,
    and lie where bfloat16 rounds z up farthest: by 2^-8 of it. Their embeddings are opposite to that of the row's one
    other token, whose norm goes with the request.
    """
    tiles, low = 9, 16.125
    rows: list[tuple[float, float, int]] = []  # temperature, largest logit, tiles with mass
    for step in range(8):
        temperature = low / (257.001 + 2 * step)  # a hair above the middle of two bfloat16 numbers
        for gap in range(1, 20):
            largest = low + 0.125 * gap
            rounded = torch.tensor([low / temperature, largest / temperature]).bfloat16().double()
            mass = reference.TILE * float(torch.exp(rounded[0] - rounded[1]))
            count = int(0.97 * share * tolerance / mass)
            if 1 <= count < tiles and count * mass > 0.85 * share * tolerance:
                rows.append((temperature, largest, count))
    norms = torch.linspace(0.3, 1.5, 13) * share / (1.0 - share)
    rows = [row for row in rows[:4] for _ in norms]
    norms = norms.repeat(len(rows) // len(norms))
    logits = torch.full((len(rows), 1, tiles * reference.TILE), -100.0)
    embedding = torch.zeros(tiles * reference.TILE, 8)
    embedding[reference.TILE :, 0] = -1.0
    embedding[reference.TILE :, 1] = 2.0**-10  # shows in a result where they are not skipped
    for index, (_, largest, count) in enumerate(rows):
        logits[index, 0, index] = largest
        logits[index, 0, reference.TILE : (count + 1) * reference.TILE] = low
        embedding[index, 0] = norms[index]
    temperature = torch.tensor([row[0] for row in rows])
    how = {
        **{"pinned": None, "embedding": embedding.bfloat16(), "embedding_scale": 1.0},
        **{"tolerance": tolerance, "max_embedding_norm": 1.0},
    }
    return Case(logits.bfloat16(), 0.0, temperature), how


def assert_kept_at_the_bound(result: Tensor, case: Case, how: dict[str, Any]) -> None:
    difference = (result.double() - exact(case, how)).norm(dim=-1)
    limit = (how["tolerance"] + 2.0**-8) * result.double().norm(dim=-1)
    assert bool((difference <= limit).all()), float((difference / limit).max())
    # Both sides of the check.
    skipped = result[:, 0, 1] == 0
    assert 8 < int(skipped.sum()) < len(skipped) - 8


def test_skipped_mass_at_the_bound(cpu_variant: str) -> None:
    """The bound on a tile's mass counts how far bfloat16 moves it: here by e, so rows would be twice as far off."""
    case, how = at_the_bound(*((0.125, 0.25) if BACKEND == "cpu" else (0.25, 0.125)))
    given = softmax_statistics(denoise.vocabulary_statistics(**case.logits_params))
    assert_kept_at_the_bound(denoise.soft_embedding(**case.logits_params, **given, **how), case, how)


def test_skipped_tiles_are_not_read(cpu_variant: str) -> None:
    """The embedding of every token but three per row is NaN: a peaked row must not touch it, a dense one must.

    On a GPU whole tiles are left out, so it is that of every tile without such a token.
    """
    case = peaked(torch.bfloat16, spread=1.0, among=None if BACKEND == "cpu" else 500)
    how = {**make_embedding(case), "tolerance": TOLERANCE}
    z = case.logits.float()
    wanted = torch.zeros(4096, dtype=torch.bool).scatter(0, z.topk(3).indices.flatten(), True)
    if BACKEND != "cpu":
        wanted = wanted.view(-1, reference.TILE).any(dim=1).repeat_interleave(reference.TILE)
    read = how["embedding"]
    how["embedding"] = torch.where(wanted[:, None], read, NAN).to(torch.bfloat16)
    arguments = {**case.logits_params, **softmax_statistics(denoise.vocabulary_statistics(**case.logits_params))}
    sparse = denoise.soft_embedding(**arguments, **how)
    assert not sparse.isnan().any()
    assert denoise.soft_embedding(**arguments, **{**how, "tolerance": 0.0}).isnan().all()
    dense = exact(case, {**how, "embedding": read})
    assert bool(((sparse.double() - dense).norm(dim=-1) <= 2.0**-7 * dense.norm(dim=-1)).all())


def test_a_row_that_fails_the_bound_is_done_densely(cpu_variant: str) -> None:
    """The three tokens that have the mass have embeddings that cancel, so the skipped rest would show."""
    case = peaked(DTYPES[0])
    how = {**make_embedding(case), "tolerance": TOLERANCE}
    tokens = case.logits.topk(3).indices
    how["embedding"][tokens.flatten()] = 0.0
    wanted = exact(case, how)
    arguments = {**case.logits_params, **softmax_statistics(denoise.vocabulary_statistics(**case.logits_params))}
    result = denoise.soft_embedding(**arguments, **how)
    rounding = 0.0 if DTYPES[0] == torch.float32 else 2.0**-8
    assert bool(((result.double() - wanted).norm(dim=-1) <= (TOLERANCE + rounding) * wanted.norm(dim=-1)).all())
    # The test can detect a missing bound: with an embedding norm of 0 these rows are all zero.
    unchecked = denoise.soft_embedding(**arguments, **{**how, "max_embedding_norm": 0.0})
    lost = unchecked.double().norm(dim=-1) < 0.5 * wanted.norm(dim=-1)
    # Fewer rows where whole tiles are skipped: a tile that another row needs is read for all.
    assert int(lost.sum()) > (0.5 if BACKEND == "cpu" else 0.25) * lost.numel()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
def test_a_temperature_near_zero_gives_the_largest(
    tolerance: float, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """z is near 500,000 and its bf16 neighbours are 2,048 apart: the sampler's normaliser would overflow."""
    case = replace(make_case(torch.bfloat16, vocabulary=300), temperature=torch.tensor([1e-4, 3e-5]))
    case.logits[..., 77] = 20.0
    how = {**make_embedding(case), "tolerance": tolerance}
    result = soft(form, monkeypatch, case, how)
    wanted = (how["embedding"][77] * torch.tensor(9.8, dtype=torch.bfloat16)).expand_as(result)
    assert bool((result == wanted).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
def test_pinned_inactive_and_not_finite(tolerance: float, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = peaked(torch.bfloat16, vocabulary=1000, batch=3, length=4)
    case.active = torch.tensor([True, False, True])
    case.logits[1], case.temperature[1] = NAN, NAN
    case.logits[2, 3, 5] = NAN
    how = {**make_embedding(case), "tolerance": tolerance}
    how["pinned"] = torch.zeros(3, 4, dtype=torch.bool)
    how["pinned"][0, 2] = True
    module = use(form, monkeypatch)
    arguments = {**case.logits_params, **softmax_statistics(module.vocabulary_statistics(**case.logits_params)), **how}
    out = torch.full((3, 4, 96), 77.0, dtype=torch.bfloat16)
    if form == "plain":
        module.soft_embedding_out(*in_order(arguments), out=out, workspace=None)
    else:
        workspace = torch.full(
            (denoise.soft_embedding_workspace(*case.logits.shape, 96, case.logits.device),), 255, dtype=torch.uint8
        )
        assert module.soft_embedding(**arguments, out=out, workspace=workspace) is out
    assert bool((out[1] == 77).all())
    assert bool((out[0, 2] == 0).all())
    assert bool(out[2, 3].isnan().all())
    finite = Case(case.logits.nan_to_num(0.0), 30.0, case.temperature.nan_to_num(1.0))
    wanted = exact(finite, how)
    for b, i in ((0, 0), (0, 1), (0, 3), (2, 0), (2, 1), (2, 2)):
        assert float((out[b, i].double() - wanted[b, i]).norm()) <= 2.0**-7 * float(wanted[b, i].norm())
    whole = module.soft_embedding(**arguments)
    assert bits(whole[[0, 2]]) == bits(out[[0, 2]])


@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_or_threads(tolerance: float, dtype: torch.dtype, cpu_variant: str) -> None:
    """13 rows per request: alone and together they are in different register tiles; half of them are sparse."""
    case = make_case(dtype, batch=3, length=13, vocabulary=5001)
    case.logits[:, ::2, 4000] = 60.0
    how = {**make_embedding(case, 136), "tolerance": tolerance}
    given = softmax_statistics(denoise.vocabulary_statistics(**case.logits_params))
    whole = denoise.soft_embedding(**case.logits_params, **given, **how)
    torch.set_num_threads(1)
    try:
        for b in range(3):
            one = {name: t[b : b + 1].contiguous() for name, t in given.items()}
            assert bits(denoise.soft_embedding(**case.request(b).logits_params, **one, **how)[0]) == bits(whole[b])
    finally:
        torch.set_num_threads(2)


def test_more_rows_than_one_pass_takes(cpu_variant: str) -> None:
    """300 dense rows: two passes over the embedding."""
    case = make_case(torch.bfloat16, batch=2, length=150, vocabulary=300)
    how = make_embedding(case, 16)
    result = denoise.soft_embedding(
        **case.logits_params, **softmax_statistics(denoise.vocabulary_statistics(**case.logits_params)), **how
    )
    assert_close(result, exact(case, how), torch.bfloat16, in_low_precision(case, how))


def good_arguments() -> dict[str, Any]:
    case = make_case(torch.bfloat16, length=3, vocabulary=300)
    return {
        **case.logits_params,
        **softmax_statistics(denoise.vocabulary_statistics(**case.logits_params)),
        **make_embedding(case),
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embedding", torch.zeros(300, 96)),
        ("embedding", torch.zeros(301, 96, dtype=torch.bfloat16)),
        ("embedding", torch.zeros(300, dtype=torch.bfloat16)),
        ("embedding", torch.zeros(96, 300, dtype=torch.bfloat16).T),
        ("tolerance", -0.1),
        ("tolerance", NAN),
        ("tolerance", 1.0),
        ("embedding_scale", NAN),
        ("max_embedding_norm", NAN),
        ("max_embedding_norm", -1.0),
        ("pinned", torch.zeros(2, 3, dtype=torch.int32)),
        ("pinned", torch.zeros(2, 4, dtype=torch.bool)),
        ("row_sum", torch.ones(2, 3)),
        ("tile_sum", torch.ones(2, 3, 2)),
        ("softcap", -30.0),
    ],
)
def test_bad_input(name: str, value: Any) -> None:
    bad = {**good_arguments(), name: value}
    with pytest.raises(ValueError, match=rf"^{name}: got .*wants"):
        denoise.soft_embedding(**bad)
    with pytest.raises(RAW_ERRORS):
        torch.ops.dgemma.soft_embedding(*bad.values())


def test_bad_out_and_workspace() -> None:
    good = good_arguments()
    out = torch.zeros(2, 3, 96, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^out: got .*wants"):
        denoise.soft_embedding(**good, out=out.float())
    small = torch.zeros(denoise.soft_embedding_workspace(*good["logits"].shape, 96, out.device) - 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^workspace: got .*wants"):
        denoise.soft_embedding(**good, out=out, workspace=small)


def test_opcheck() -> None:
    arguments = tuple(good_arguments().values())
    library.opcheck(torch.ops.dgemma.soft_embedding.default, arguments)
    given = {
        "out": torch.zeros(2, 3, 96, dtype=torch.bfloat16),
        "workspace": torch.zeros(
            denoise.soft_embedding_workspace(*arguments[0].shape, 96, arguments[0].device), dtype=torch.uint8
        ),
    }
    library.opcheck(torch.ops.dgemma.soft_embedding.out, arguments, given)
