"""sample and noise_ on every instruction set of the machine, and their form in torch."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, library

from backend import BACKEND, not_on_test_bed, skip_if_on_device
from c_interface import load, must
from c_operations import denoise_operations
from denoise_cases import DTYPES, FORMS, NAN, RAW_ERRORS, Case, draws, int32, make_case, softmax_statistics, use
from dgemma_ext import _C
from dgemma_ext.ops import denoise
from dgemma_ext.ops.description import OPERATORS
from dgemma_ext.ops.plain import denoise as denoise_plain
from reference import denoise as reference

# Known answers by the authors (Random123, kat_vectors, philox4x32 with 10 rounds): counter, key, output.
ONES = 0xFFFFFFFF
PHILOX_VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX_VECTORS)
def test_philox(counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert _C.philox4x32_10(*counter, *key) == words
    assert reference.philox(counter, key) == words
    plain = denoise_plain.philox4x32_10([torch.tensor(c) for c in counter], *(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in plain) == words


def drawn_uniforms(drawing: dict[str, Tensor], length: int, purpose: int) -> Tensor:
    """The draws of the operators, by Python's integers: float64 [batch, length]."""
    rows = zip(*(drawing[name].tolist() for name in ("seed", "canvas_index", "step")), strict=True)
    return torch.tensor(
        [[reference.uniform(seed, canvas, step, i, purpose) for i in range(length)] for seed, canvas, step in rows],
        dtype=torch.float64,
    )


def sampled(form: str, monkeypatch: pytest.MonkeyPatch, case: Case, uniforms: Tensor | None = None, **drawing: Any):  # type: ignore[no-untyped-def]
    module = use(form, monkeypatch)
    statistics = module.vocabulary_statistics(**case.logits_params)
    drawing = drawing or draws(case.logits.shape[0])
    return module.sample(**case.logits_params, **softmax_statistics(statistics), **drawing, uniforms=uniforms)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocabulary", [257, 1000, 4096])
def test_tokens_of_given_uniforms(
    vocabulary: int, masked: bool, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(dtype, vocabulary=vocabulary, masked=masked)
    uniforms = torch.rand(case.logits.shape[:2], dtype=torch.float64)
    uniforms[0, :4] = torch.tensor([0.0, 1.0 - 2.0**-53, 0.5, 2.0**-53], dtype=torch.float64)
    tokens = sampled(form, monkeypatch, case, uniforms).long()
    ends = reference.boundaries(case.logits, case.softcap, case.temperature, case.mask)
    end = ends.gather(-1, tokens[..., None])[..., 0]
    begin = torch.where(tokens > 0, ends.gather(-1, (tokens - 1).clamp(min=0)[..., None])[..., 0], 0.0)
    # Masses are float32 of exponents up to 30 / 0.4, so their error is 1e-5 of the whole.
    assert bool((begin - 1e-5 <= uniforms).all())
    assert bool((uniforms <= end + 1e-5).all())
    mass = torch.exp(reference.scaled(case.logits, case.softcap, case.temperature) - case.exact().row_max[..., None])
    assert bool((mass.gather(-1, tokens[..., None]) > 1e-45).all()), "a token without mass"
    assert bool(case.mask.gather(-1, tokens[..., None]).all()), "a token that is not allowed"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_cut_the_unit_interval_exactly(
    dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 equal masses of 1: u = k / 512 is id k, the double before it id k - 1, on tile boundaries too."""
    ids = torch.arange(512, dtype=torch.float64) / 512
    uniforms = torch.stack([ids, torch.nextafter(ids, -torch.ones(())).clamp(min=0.0)])
    case = Case(torch.full((2, 512, 512), 3.25, dtype=dtype), 30.0, torch.tensor([0.7, 0.4]))
    tokens = sampled(form, monkeypatch, case, uniforms)
    assert tokens[0].tolist() == list(range(512))
    assert tokens[1].tolist() == [max(k - 1, 0) for k in range(512)]


@pytest.mark.parametrize("form", FORMS)
def test_entries_without_mass_are_never_drawn(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten entries have all the mass; the others underflow to zero, or are not allowed."""
    heavy = [3, 127, 128, 200, 255, 256, 300, 383, 384, 500]
    cuts = [k / 10 + e for k in range(10) for e in (0.0, 0.0999)]
    uniforms = torch.tensor([[*cuts, 1.0 - 2.0**-53]], dtype=torch.float64)
    expected = [h for h in heavy for _ in (0, 1)] + [500]
    logits = torch.full((1, 21, 513), -400.0)
    logits[..., heavy] = 5.0
    case = Case(logits, 0.0, torch.ones(1))
    assert sampled(form, monkeypatch, case, uniforms).tolist() == [expected]
    allowed = denoise.pack_allowed([heavy], 513)
    case = Case(torch.full((1, 21, 513), 2.0), 30.0, torch.ones(1), None, allowed, torch.zeros(1, 21).int())
    assert sampled(form, monkeypatch, case, uniforms).tolist() == [expected]


@pytest.mark.parametrize("form", FORMS)
def test_masses_that_round_below_the_target_give_the_last_token(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """row_sum is a little above the sum of the tiles, so the target is beyond all of them."""
    case = Case(torch.zeros(1, 1, 300), 30.0, torch.ones(1))
    case.logits[..., 290:] = -torch.inf  # this forbids tokens without a mask, but gives them no mass
    module = use(form, monkeypatch)
    clean = Case(case.logits.clamp(min=-1e30), 0.0, torch.ones(1))
    given = softmax_statistics(module.vocabulary_statistics(**clean.logits_params))
    given["row_sum"] = given["row_sum"] * (1 + 1e-9)
    last = torch.full((1, 1), 1.0 - 2.0**-53, dtype=torch.float64)
    assert module.sample(**clean.logits_params, **given, **draws(1), uniforms=last).item() == 289


@pytest.mark.parametrize("form", FORMS)
def test_drawn_uniforms_are_philox(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(torch.bfloat16, batch=3)
    drawing = draws(3)
    tokens = sampled(form, monkeypatch, case, None, **drawing)
    given = drawn_uniforms(drawing, case.logits.shape[1], int(denoise.Purpose.SAMPLE))
    assert tokens.tolist() == sampled(form, monkeypatch, case, given, **drawing).tolist()
    assert tokens.tolist() != sampled(form, monkeypatch, case, None, **draws(3, seed=8)).tolist()


def chi_square_score(counts: Tensor, expected: Tensor) -> float:
    """Pearson's statistic as a normal deviate (Wilson and Hilferty 1931); cells that expect fewer than 5 are joined."""
    small = expected < 5
    observed = torch.cat([counts[~small], counts[small].sum()[None]])
    wanted = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = wanted > 0
    statistic = float(((observed - wanted)[keep] ** 2 / wanted[keep]).sum())
    freedom = int(keep.sum()) - 1
    return ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))


@not_on_test_bed
@pytest.mark.parametrize("form", FORMS)
def test_the_distribution_is_softmax(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """204,800 draws over requests, positions and steps. A deviate of 3.72 is p = 1e-4."""
    batch, length, vocabulary, steps = 8, 512, 1000, 50
    logits = (torch.randn(vocabulary) * 3).expand(batch, length, vocabulary).contiguous()
    case = Case(logits, 30.0, torch.full((batch,), 0.8))
    module = use(form, monkeypatch)
    given = softmax_statistics(module.vocabulary_statistics(**case.logits_params))
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for step in range(1, steps + 1):
        drawing = {"seed": torch.arange(batch), "canvas_index": int32(*[0] * batch), "step": int32(*[step] * batch)}
        tokens = module.sample(**case.logits_params, **given, **drawing, uniforms=None)
        counts += torch.bincount(tokens.flatten(), minlength=vocabulary)
    exact = torch.softmax(reference.scaled(logits[:1, :1], 30.0, case.temperature[:1])[0, 0], dim=-1)
    assert abs(chi_square_score(counts, exact * batch * length * steps)) < 3.72
    # The test can detect a bias: the same counts against a distribution one per cent hotter.
    hotter = torch.softmax(reference.scaled(logits[:1, :1], 30.0, case.temperature[:1] * 1.02)[0, 0], dim=-1)
    assert chi_square_score(counts, hotter * batch * length * steps) > 3.72


@pytest.mark.parametrize("form", FORMS)
def test_inactive_and_not_finite(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(make_case(torch.float32, batch=3, vocabulary=300), active=torch.tensor([True, False, True]))
    case.logits[1], case.temperature[1] = NAN, NAN
    case.logits[2, 1, 7] = NAN
    module = use(form, monkeypatch)
    given = softmax_statistics(module.vocabulary_statistics(**case.logits_params))
    uniforms = torch.rand(3, 24, dtype=torch.float64)
    uniforms[1] = NAN
    out = torch.full((3, 24), -9, dtype=torch.int32)
    arguments = {**case.logits_params, **given, **draws(3), "uniforms": uniforms}
    if form == "plain":
        module.sample_out(*(arguments[argument.name] for argument in OPERATORS["sample"].arguments), out=out)
    else:
        module.sample(**arguments, out=out)
    assert bool((out[1] == -9).all())
    assert out[2, 1] == 0, "the lowest allowed token of a row that is not finite"
    whole = module.sample(**arguments)
    assert whole[[0, 2]].tolist() == out[[0, 2]].tolist()


def test_samples_do_not_depend_on_batch_or_threads(cpu_variant: str) -> None:
    case = make_case(torch.bfloat16, batch=4)
    drawing = draws(4)
    given = softmax_statistics(denoise.vocabulary_statistics(**case.logits_params))
    whole = denoise.sample(**case.logits_params, **given, **drawing)
    torch.set_num_threads(1)
    try:
        for b in range(4):
            one = {name: t[b : b + 1].contiguous() for name, t in {**given, **drawing}.items()}
            assert denoise.sample(**case.request(b).logits_params, **one)[0].tolist() == whole[b].tolist()
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("purpose", list(denoise.Purpose))
def test_noise(purpose: denoise.Purpose, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, vocabulary = 4, 40, 257
    keep = torch.rand(batch, length) < 0.3
    active = torch.tensor([True, True, False, True])
    drawing = draws(batch)
    uniforms = drawn_uniforms(drawing, length, int(purpose))
    tokens = torch.full((batch, length), -5, dtype=torch.int32)
    module = use(form, monkeypatch)
    arguments = {"active": active, "keep": keep}
    module.noise_(tokens, vocabulary, int(purpose), **drawing, **arguments, uniforms=None)
    for b in range(batch):
        for i in range(length):
            skipped = bool(keep[b, i]) or not bool(active[b])
            expected = -5 if skipped else reference.uniform_token(list(range(vocabulary)), float(uniforms[b, i]))
            assert int(tokens[b, i]) == expected


@pytest.mark.parametrize("form", FORMS)
def test_noise_at_the_ends_of_the_interval(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 262144
    uniforms = torch.tensor([[0.0, 1.0 - 2.0**-53, 0.5, 1.0 / vocabulary]], dtype=torch.float64)
    tokens = torch.zeros(1, 4, dtype=torch.int32)
    nothing = {"active": None, "keep": None}
    use(form, monkeypatch).noise_(tokens, vocabulary, 0, **draws(1), **nothing, uniforms=uniforms)
    assert tokens.tolist() == [[0, 262143, 131072, 1]]


@pytest.mark.skipif(BACKEND == "cuda", reason="the C interface on the host's memory")
def test_noise_of_a_host_that_gives_allowed_sets() -> None:
    """The package gives `noise` and `update_canvas` none, and the C interface keeps what it says of them."""
    assert _C.__file__ is not None
    where = "cuda" if BACKEND == "sim" else "cpu"
    interface = load() if BACKEND == "cpu" else ctypes.CDLL(_C.__file__)
    batch, length, vocabulary = 2, 40, 257
    rows = [[256], [0, 31, 32, 200, 256], list(range(1, 257, 2))]
    mask = denoise.pack_allowed(rows, vocabulary)
    mask[1, -1] |= -(2**31)  # a bit beyond the vocabulary has no effect
    index = torch.arange(batch * length, dtype=torch.int32).view(batch, length) % 4 - 1
    allowed = {"mask": mask, "rows": len(rows), "row_index": index}
    values = denoise_operations(torch.float32, batch, length, vocabulary)
    uniforms = torch.rand(batch, length, dtype=torch.float64)
    wanted = [
        [
            reference.uniform_token(list(range(vocabulary)) if r < 0 else rows[r], float(u))
            for r, u in zip(*both, strict=True)
        ]
        for both in zip(index.tolist(), uniforms, strict=True)
    ]
    must(interface, f"{where}_noise", **(given := {**values["noise"], "allowed": allowed, "uniforms": uniforms}))
    assert given["tokens"].tolist() == wanted
    never = {"entropy_bound": torch.zeros(batch), "entropy": torch.ones(batch, length), "uniforms": uniforms}
    must(interface, f"{where}_update_canvas", **(given := {**values["update_canvas"], "allowed": allowed, **never}))
    # The first position is accepted whatever its entropy.
    assert [row[1:] for row in given["canvas"].tolist()] == [row[1:] for row in wanted]


def test_pack_allowed() -> None:
    packed = denoise.pack_allowed([[0, 31, 32], [69]], 70)
    assert packed.tolist() == [[1 - 2**31, 1, 0], [0, 0, 32]]
    for rows, wanted in (([[]], "at least one"), ([[1], [70]], "0 to 69"), ([[-1]], "0 to 69")):
        with pytest.raises(ValueError, match=wanted):
            denoise.pack_allowed(rows, 70)


def good_sample() -> dict[str, Any]:
    case = make_case(torch.float32, length=3, vocabulary=300)
    given = softmax_statistics(denoise.vocabulary_statistics(**case.logits_params))
    return {**case.logits_params, **given, **draws(2), "uniforms": torch.rand(2, 3, dtype=torch.float64)}


def good_noise() -> dict[str, Any]:
    return {
        "tokens": torch.zeros(2, 3, dtype=torch.int32),
        "vocabulary": 300,
        "purpose": 0,
        **draws(2),
        "active": None,
        "keep": None,
        "uniforms": torch.rand(2, 3, dtype=torch.float64),
    }


BAD_DRAWS: dict[str, tuple[str, Any]] = {
    "uniform of one": ("uniforms", torch.ones(2, 3, dtype=torch.float64)),
    "negative uniform": ("uniforms", torch.full((2, 3), -1e-300, dtype=torch.float64)),
    "uniform NaN": ("uniforms", torch.full((2, 3), NAN, dtype=torch.float64)),
    "float32 uniforms": ("uniforms", torch.zeros(2, 3)),
    "shape of uniforms": ("uniforms", torch.zeros(2, 4, dtype=torch.float64)),
    "int32 seed": ("seed", int32(1, 2)),
    "shape of seed": ("seed", torch.zeros(3, dtype=torch.int64)),
    "int64 step": ("step", torch.ones(2, dtype=torch.int64)),
    "float canvas index": ("canvas_index", torch.zeros(2)),
}


OF_VALUES = {"uniform of one", "negative uniform", "uniform NaN"}


@pytest.mark.parametrize("what", [*BAD_DRAWS, "row_sum", "row_max", "tile_max", "tile_sum", "temperature"])
def test_bad_sample(what: str) -> None:
    skip_if_on_device(what, OF_VALUES)
    good = good_sample()
    name, value = BAD_DRAWS[what] if what in BAD_DRAWS else (what, good.get(what, torch.ones(1)).half())
    bad = {**good, name: value}
    with pytest.raises(ValueError, match=rf"^{name}: got .*wants"):
        denoise.sample(**bad)
    with pytest.raises(RAW_ERRORS):
        torch.ops.dgemma.sample(*bad.values())


@pytest.mark.parametrize("what", [*BAD_DRAWS, "int64 tokens", "vocabulary", "purpose", "keep", "active"])
def test_bad_noise(what: str) -> None:
    skip_if_on_device(what, OF_VALUES)
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        **{key: (name, {name: value}) for key, (name, value) in BAD_DRAWS.items()},
        "int64 tokens": ("tokens", {"tokens": torch.zeros(2, 3, dtype=torch.int64)}),
        "vocabulary": ("vocabulary", {"vocabulary": 0}),
        "purpose": ("purpose", {"purpose": 3}),
        "keep": ("keep", {"keep": torch.zeros(2, 3, dtype=torch.int32)}),
        "active": ("active", {"active": torch.ones(3, dtype=torch.bool)}),
    }
    name, change = changes[what]
    bad = {**good_noise(), **change}
    with pytest.raises(ValueError, match=rf"^{name}: got .*wants"):
        denoise.noise_(**bad)
    before = bad["tokens"].clone()
    with pytest.raises(RAW_ERRORS):
        torch.ops.dgemma.noise_(*bad.values())
    assert bool((bad["tokens"] == before).all()), "written before it was checked"


def test_opcheck() -> None:
    arguments = tuple(good_sample().values())
    library.opcheck(torch.ops.dgemma.sample.default, arguments)
    library.opcheck(torch.ops.dgemma.sample.out, arguments, {"out": torch.zeros(2, 3, dtype=torch.int32)})
    library.opcheck(torch.ops.dgemma.noise_.default, tuple(good_noise().values()))
